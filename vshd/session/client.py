"""The client's side of a session: the connection's bytes in and out, and whether the client still is there.

Owns the client's descriptor, the receive buffers and the watch over silence. Knows the connection's events and hands
them on; knows nothing of what the target is.
"""

import os
import select
import time

from vshd.carry.conduit import write_output
from vshd.session.intake import Intake
from vshd.wire import messages
from vshd.wire.buffers import Buffers
from vshd.wire.events import Broken, Data, Event, Failed, Held
from vshd.wire.messages import Failure
from vshd.wire.server import ServerConnection
from vshd.wire.silence import Silence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# A receive of this much is bulk, and so many may follow one another; then signals and output have their turn.
BULK_PIECE = 1 << 14
RECEIVES_AT_ONCE = 8

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class ClientSide:
    """Invariant: `lost` is why the session ended before the target did; empty while it has not."""

    def __init__(
        self,
        fd: int,
        connection: ServerConnection,
        stdin: Intake,
        obey: "Callable[[Event], None]",
        on_sent: "Callable[[], None]",
    ) -> None:
        """stdin: takes the client's data. obey: gets every other event that is for the target.

        on_sent: called whenever all that waited has left.
        """
        self.fd = fd
        self.connection = connection
        self.lost = ""
        self._stdin = stdin
        self._obey = obey
        self._on_sent = on_sent
        self._buffers = Buffers()
        self._silence: Silence | None = None
        if connection.peer is not None and connection.limits is not None:
            self._silence = Silence(
                own_ms=connection.limits.silence_ms, peer_ms=connection.peer.silence_ms, now_s=time.monotonic()
            )

    # Readiness.

    def find_mask(self, *, is_reading: bool) -> int:
        """What its descriptor is polled for."""
        return (select.POLLIN if is_reading else 0) | (select.POLLOUT if self.connection.output.size else 0)

    def check_silence(self) -> float | None:
        """Tells a quiet client that we live, and gives one up that does not; seconds to the next look, None: never."""
        silence = self._silence
        if silence is None:
            return None
        now_s = time.monotonic()
        if silence.is_peer_lost(now_s):
            self.lost = "the client has fallen silent"
        if silence.is_word_due(now_s):
            self.connection.send_alive()
            silence.said(now_s)
            self.flush()
        return silence.wait_s(now_s)

    # From the client.

    def receive(self, mask: int, is_stuffed: "Callable[[], bool]") -> None:
        """Reads the connection; and while it brings bulk, goes on without a round of the loop for each piece."""
        if not mask & (select.POLLIN | _ERRORS):
            return
        for _ in range(RECEIVES_AT_ONCE):
            if not self._receive_once() or self.lost or is_stuffed():
                return

    def receive_early(self) -> None:
        """What came with the request."""
        self._handle(self.connection.receive_data(b""))

    def _receive_once(self) -> bool:
        """Whether more is likely to be there."""
        stdin = self._stdin
        room = stdin.bulk_room
        if room:
            taken = stdin.pass_bulk(self.fd, room)
            if taken:
                self._hear()
                return taken == room
        buffer = self._buffers.current
        head_size = stdin.bulk_head_size
        if head_size:
            buffer = buffer[:head_size]
        try:
            size = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self._handle(self.connection.receive_end())
            self.lost = self.lost or "the client is gone"
            return False
        self._hear()
        self._handle(self.connection.receive_data(buffer[:size]))
        if stdin.waiting.is_borrowing:
            self._buffers.secure(stdin.waiting)
        self._buffers.received(size)
        return size >= BULK_PIECE or (head_size > 0 and stdin.bulk_room > 0)

    def _hear(self) -> None:
        if self._silence is not None:
            self._silence.heard(time.monotonic())

    def _handle(self, events: list[Event]) -> None:
        data: list[memoryview] = []
        for event in events:
            if isinstance(event, Data):
                data.append(event.data)
                continue
            # In the client's order: input that follows a window's size or a signal is for who has seen those.
            if data:
                self._stdin.take(data)
                data = []
            self._take(event)
        if data:
            self._stdin.take(data)

    def _take(self, event: Event) -> None:
        if isinstance(event, Held):
            if self._silence is not None:
                self._silence.hold()
        elif isinstance(event, Failed):
            self.lost = event.description
        elif isinstance(event, Broken):
            self.lost = event.reason
            if not event.is_end:
                self.connection.send_failure(event.reason, Failure(messages.PROTOCOL))
        else:
            self._obey(event)

    # To the client.

    def flush(self) -> None:
        """Sends what waits, as far as the client takes it."""
        output = self.connection.output
        if not output.size:
            return
        if self._silence is not None:
            self._silence.said(time.monotonic())
        try:
            while output.size:
                write_output(output, self.fd)
        except BlockingIOError:
            return
        except OSError as error:
            # What the client sent before it went still counts for nothing: its session is over.
            self.lost = self.lost or f"the client is gone: {error.strerror}"
            return
        self._on_sent()

    def refuse(self, reason: str, failure: Failure) -> None:
        """Ends the session for a reason of ours."""
        self.lost = reason
        self.connection.send_failure(reason, failure)
