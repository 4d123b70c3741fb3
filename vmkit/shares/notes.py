"""What the guard of a virtiofsd notes for its deputy, which takes its place when it is killed.

The guard can be killed between any two system calls. Whatever it has read by then, and not noted, would be lost; and a
reply that comes twice ends QEMU's device. So the kernel keeps what a process could not say any more:

1. The guard looks at a message of QEMU's, or the part of it that has come. It sets the connection's peek offset to the
   size of this piece, and notes a copy (PIECE). Then it takes the piece, which makes the offset 0, and notes that
   (TAKEN). So a deputy that has no TAKEN sees at this offset whether the piece is in the connection still.
2. The guard writes its reply into a pipe, notes it (ANSWER), and has the kernel move it from there to QEMU. So a deputy
   that has the ANSWER sees in the pipe whether QEMU has the reply.
"""

import contextlib
import fcntl
import os
import signal
import socket
import struct
import termios
from enum import IntEnum
from typing import Final

from vmkit.vsock import vhost_user as vu

# asm-generic/socket.h.
SO_PEEK_OFF: Final = 42
# The largest is a piece of a message.
MAX_NOTE_BYTES: Final = 1 + vu.HEADER.size + vu.MAX_PAYLOAD_BYTES
# A deputy that has stopped keeps the guard for no longer.
NOTE_DEADLINE_S: Final = 10.0
PID: Final = struct.Struct("<I")
_COUNT: Final = struct.Struct("i")


class Note(IntEnum):
    """The first byte of a note; the others, and its descriptors, follow in the same packet."""

    # virtiofsd's pid, which is that of its process group too.
    SERVER = 1
    # All of that group is killed, and the pid may become another's.
    KILLED = 2
    # QEMU's connection.
    QEMU = 3
    PIECE = 4
    TAKEN = 5
    # A whole reply: QEMU's, or what virtiofsd has answered the guard itself.
    ANSWER = 6


class Deputy:
    """The guard's end. Invariant: the deputy has every note, or it is killed. Then the guard goes on alone."""

    def __init__(self, notes: socket.socket, pidfd: int, replies: tuple[int, int]) -> None:
        """notes, pidfd: the deputy's. replies: both ends of the pipe, whose reading end the deputy has as well.

        All become ours.
        """
        notes.settimeout(NOTE_DEADLINE_S)
        self._notes: socket.socket | None = notes
        self._pidfd = pidfd
        self._reading, self._writing = replies

    def note(self, kind: Note, data: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Sends one note."""
        if self._notes is None:
            return
        try:
            socket.send_fds(self._notes, [bytes([kind]) + data], fds)
        except OSError:
            self._dismiss()

    def _dismiss(self) -> None:
        """What it knows may be old, and a guest's memory is no place for that."""
        if self._notes is not None:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._notes.close()
            self._notes = None

    def take_piece(self, qemu: socket.socket, decoder: vu.Decoder, size_bytes: int) -> tuple[bytes, list[int]]:
        """vmkit.vsock.vhost_user.receive_piece(), noted. A whole message, where one is there and none has begun.

        Raises OSError, VhostUserError.
        """
        seen, copies = _look(qemu, size_bytes, is_start=not decoder.is_within_message)
        count = len(copies)
        try:
            if not seen:
                return seen, []
            qemu.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, len(seen))
            self.note(Note.PIECE, seen, tuple(copies))
        finally:
            _close(copies)
        data, fds = vu.receive_piece(qemu, len(seen))
        if len(data) == len(seen) and len(fds) == count:
            self.note(Note.TAKEN)
        else:
            self._dismiss()
        return data, fds

    def answer(self, qemu: socket.socket, reply: bytes) -> None:
        """Sends QEMU a whole reply. Raises OSError."""
        os.write(self._writing, reply)
        self.note(Note.ANSWER, reply)
        move_replies(self._reading, qemu)

    def close(self) -> None:
        """The guard ends."""
        if self._notes is not None:
            self._notes.close()
        for fd in (self._pidfd, self._reading, self._writing):
            os.close(fd)


def _look(qemu: socket.socket, size_bytes: int, *, is_start: bool) -> tuple[bytes, list[int]]:
    """The next piece, which stays in the connection; the copies of its descriptors are the caller's."""
    qemu.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    if is_start:
        head, fds = vu.receive_piece(qemu, size_bytes, socket.MSG_PEEK)
        _close(fds)
        if len(head) == vu.HEADER.size:
            size_bytes += min(vu.HEADER.unpack(head)[2], vu.MAX_PAYLOAD_BYTES)
    # A look stops behind the first descriptors. It shows those of the next message too, if that follows at once: then
    # there is one byte more.
    seen, fds = vu.receive_piece(qemu, size_bytes + 1, socket.MSG_PEEK)
    if len(seen) > size_bytes:
        _close(fds)
    return seen[:size_bytes], fds


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def is_taken(qemu: socket.socket) -> bool:
    """Whether the guard has taken the piece that it noted last."""
    return qemu.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == 0


def move_replies(replies: int, qemu: socket.socket) -> None:
    """What is in the pipe goes to QEMU. Raises OSError."""
    while size := _COUNT.unpack(fcntl.ioctl(replies, termios.FIONREAD, bytes(_COUNT.size)))[0]:
        os.splice(replies, qemu.fileno(), size)
