"""The target's stdin: what the client has sent and the target has not taken yet.

Owns our end of it. Nothing is refused and nothing is waited for: in extended mode the client's credit bounds what is
kept, in legacy mode the relay, which stops reading the connection. Bulk is kept in a conduit.
"""

import os

from vshd.carry.conduit import SPLICE_SIZE, Conduit, enlarge_pipe, open_conduit, write_output
from vshd.wire import messages
from vshd.wire.output import Output
from vshd.wire.server import ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CTRL_D = b"\x04"


class Intake:
    """Invariant: `fd` is -1 once the target's stdin is closed, and then nothing waits; what waits elsewhere is in
    `_conduit`. The code that opened a terminal closes it.
    """

    def __init__(
        self, connection: ServerConnection, fd: int, *, is_terminal: bool, on_close: "Callable[[int], None]"
    ) -> None:
        """on_close: is told the descriptor before it is closed."""
        self.fd = fd
        # Bytes that the target has taken.
        self.passed = 0
        self._connection = connection
        self._is_terminal = is_terminal
        self._on_close = on_close
        self._pending = Output()
        self._is_ending = False
        # None until there is bulk, and where it is better copied.
        self._conduit: Conduit | None = None
        self._is_bulk = False

    @property
    def waiting(self) -> Output:
        """What the target has not taken."""
        return self._pending

    @property
    def bulk_room(self) -> int:
        """How much pass_bulk() may be asked for now."""
        return self._connection.bulk_room(messages.STDIN) if self._conduit is not None else 0

    @property
    def bulk_head_size(self) -> int:
        """What the next receive should bring at most; 0: no matter. The rest of such a frame is for pass_bulk()."""
        return self._connection.bulk_head_size if self._conduit is not None else 0

    def take(self, pieces: list[memoryview]) -> None:
        """Pieces of the receive buffer: what the target does not take now waits."""
        if self.fd < 0:
            return
        pending = self._pending
        before = pending.size
        for piece in pieces:
            pending.append(piece)
        received = pending.size - before
        if not before:
            self.write()
        if received >= SPLICE_SIZE and not self._is_bulk and self.fd >= 0 and not self._is_terminal:
            self._is_bulk = True
            enlarge_pipe(self.fd)
            if self._connection.is_extended:
                self._conduit = open_conduit()

    def pass_bulk(self, fd: int, room: int) -> int:
        """The next of a large frame from fd, past this process's memory: how much.

        0 when receiving tells what there is: nothing; or no room in the conduit, since the target does not read: then
        memory takes it, up to the credit. Or the client is gone.
        """
        assert self._conduit is not None
        try:
            taken = self._conduit.fill(fd, room)
        except OSError:
            return 0
        if taken:
            self._connection.took(messages.STDIN, taken)
            self._pending.append_elsewhere(self._conduit, taken)
            if self._pending.size == taken:
                self.write()
        return taken

    def write(self) -> None:
        """What waits, as far as the target takes it."""
        pending = self._pending
        try:
            while pending.size:
                size = write_output(pending, self.fd)
                self._connection.consumed(messages.STDIN, size)
                self.passed += size
        except BlockingIOError:
            return
        except OSError:
            self.close(is_ours=False)
            return
        if self._is_ending:
            self.close(is_ours=True)

    def end(self) -> None:
        """Nothing more will come. A terminal is told so, and goes on."""
        if self.fd < 0 or self._is_ending:
            return
        if self._is_terminal:
            self._pending.append(CTRL_D)
            self.write()
            return
        self._is_ending = True
        if not self._pending.size:
            self.close(is_ours=True)

    def close(self, *, is_ours: bool) -> None:
        """Closes the target's stdin: it got all, or (not is_ours) it reads no more, which the client should know."""
        fd, self.fd = self.fd, -1
        self._pending.clear()
        if self._conduit is not None:
            self._conduit.close()
            self._conduit = None
        if fd >= 0 and not self._is_terminal:
            self._on_close(fd)
            os.close(fd)
        if not is_ours:
            self._connection.close_stream(messages.STDIN)
