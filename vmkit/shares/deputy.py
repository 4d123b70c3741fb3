"""The process that takes the place of a killed guard: it kills virtiofsd, and answers the guest as the guard would.

It is the guard's parent, and the first process of `python -m vmkit.shares.guard`. So virtiofsd's processes become its
children when the guard is gone, and it sees their end before it writes to memory that they could write to. It does
nothing else, reads nothing but the guard's notes (vmkit.shares.notes), and ends with the guard. When it is killed
alone, nothing changes.
"""

import contextlib
import os
import signal
import socket
from pathlib import Path

from vmkit.shares.notes import MAX_NOTE_BYTES, PID, Note, is_taken, move_replies
from vmkit.shares.relay import DeviceRelay, RelayError, serve_errors
from vmkit.vsock import vhost_user as vu


def stand_by(guard: int, notes: socket.socket, replies: int, path: str) -> int:
    """Waits for the guard's end, and goes on where it was killed; returns a program's status.

    guard: its pid, a child of ours. notes, replies: our ends. path: where QEMU was to connect.
    """
    standing = _StandIn(notes, replies)
    try:
        while standing.learn():
            pass
        status = os.waitstatus_to_exitcode(os.waitpid(guard, 0)[1])
        if status == 0:
            return 0
        standing.end_server()
        if standing.take_over():
            return serve_errors(standing.relay)
    except RelayError:
        return 1
    # In a folder of root's it stays until the machine ends.
    with contextlib.suppress(OSError):
        Path(path).unlink()
    return max(status, 0)


class _StandIn:
    """What the guard has noted."""

    def __init__(self, notes: socket.socket, replies: int) -> None:
        self.relay = DeviceRelay(None)
        self._notes = notes
        self._replies = replies
        self._server = 0
        self._qemu: socket.socket | None = None
        # Noted, and perhaps not taken.
        self._piece: tuple[bytes, list[int]] | None = None

    def learn(self) -> bool:
        """Reads one note; False at their end. Raises RelayError."""
        try:
            data, fds = vu.receive_piece(self._notes, MAX_NOTE_BYTES)
        except (OSError, vu.VhostUserError) as error:
            raise RelayError(f"the guard's notes: {error}") from error
        if not data:
            return False
        body = data[1:]
        match Note(data[0]):
            case Note.SERVER:
                (self._server,) = PID.unpack(body)
            case Note.KILLED:
                self._server = 0
            case Note.QEMU:
                self._qemu = socket.socket(fileno=fds[0])
                self.relay.connect(self._qemu)
            case Note.PIECE:
                self._piece = body, fds
            case Note.TAKEN:
                self._take_piece()
            case Note.ANSWER:
                request, _, _ = vu.HEADER.unpack_from(body)
                self.relay.learn_answer(request, body[vu.HEADER.size :])
        return True

    def end_server(self) -> None:
        """Kills all of virtiofsd's processes, and sees them gone. The guard has been waited for."""
        if self._server:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)

    def take_over(self) -> bool:
        """Ends what the guard had begun with QEMU; False where QEMU has not come. Raises RelayError."""
        if self._qemu is None:
            return False
        try:
            if self.relay.is_answered:
                move_replies(self._replies, self._qemu)
        except OSError as error:
            raise RelayError(f"QEMU: {error}") from error
        if is_taken(self._qemu):
            self._take_piece()
        self._drop_piece()
        self.relay.resume()
        return True

    def _drop_piece(self) -> None:
        """It is in the connection still."""
        if self._piece is not None:
            for fd in self._piece[1]:
                os.close(fd)
            self._piece = None

    def _take_piece(self) -> None:
        if self._piece is not None:
            data, fds = self._piece
            self._piece = None
            self.relay.learn_piece(data, fds)
