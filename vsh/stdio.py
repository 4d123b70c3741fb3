"""This process's own stdin, stdout and stderr, as a source and sinks that never block and never disturb others.

O_NONBLOCK belongs to the open file, which the shell and its other children share. So this module never sets it on these
descriptors. It opens pipes and terminals anew through /proc instead. When it may not, its writes after poll() stay
below the size that a pipe always takes.

It splices only pipes and devices. A regular file has a position, which the open file's other users share. read(2) and
write(2) lock the position; splice(2) does not. Two splices at once would get the same bytes, or overwrite each other's.
"""

import _socket
import os
import stat

from vsh.pump import Sink, Source
from vshd.carry.burst import BurstReader
from vshd.carry.conduit import Conduit, Sluice, enlarge_pipe

# A pipe that poll() calls writable takes this much without blocking (limits.h, pipe(7)).
PIPE_BUF = 4096
# Every page of a buffer costs a short command a fault in the kernel: it grows with what comes.
BUFFER_SIZES = (1 << 13, 1 << 16, 1 << 18)
# A terminal whose job is in the background announces nothing when it comes back.
HELD_LOOK_S = 0.3


class FdSource(Source):
    """A descriptor that is read after poll() reports it. Its end is the stream's end, for every kind of file.

    Invariant: the bytes that read() returned are in `_buffer`, which grows while reads fill it. A pipe is read through
    an opening of our own, which does not block.
    """

    def __init__(self, fd: int) -> None:
        self._origin = fd
        self._buffer = memoryview(bytearray(BUFFER_SIZES[0]))
        self._reader = BurstReader()
        self._is_pipe = self._is_spliceable = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self.is_bulk = False
        self.fd = _open_anew(fd, os.O_RDONLY) if self._is_pipe else fd
        self._is_terminal = os.isatty(fd)
        self._is_held = False

    @property
    def is_held(self) -> bool:
        """Whether the terminal belongs to another job. To read it then would stop this process."""
        self._is_held = self._is_held and is_background(self.fd)
        return self._is_held

    @property
    def look_s(self) -> float | None:
        return HELD_LOOK_S if self.is_held else None

    def read(self, limit: int) -> memoryview | None:
        if self._is_terminal and is_background(self.fd):
            self._is_held = True
            return None
        buffer = self._buffer
        try:
            size = self._read_burst(buffer if limit >= len(buffer) else buffer[:limit])
        except BlockingIOError:
            return None
        except OSError:
            # A closed descriptor, a directory, a terminal that is gone: no more bytes can come.
            return buffer[:0]
        if size == len(buffer):
            self._enlarge(size)
        return buffer[:size]

    def pass_to(self, sluice: Sluice, limit: int) -> int | None:
        try:
            size = self._reader.fill(sluice, self.fd, limit)
        except BlockingIOError:
            return None
        except OSError:
            # read() works where splice does not, and reports any other error.
            self.is_bulk = self._is_spliceable = False
            return None
        self.is_bulk = size >= BUFFER_SIZES[0]
        return size

    def close(self) -> None:
        """Closes a pipe when the target has closed its stdin, so that the pipe's writer learns it at once."""
        if self._is_pipe:
            # Our own opening goes first: its descriptor may be the last that this process could open.
            if self.fd != self._origin:
                os.close(self.fd)
            replace_with_null(self._origin, os.O_RDONLY)
            self.fd = self._origin

    def _read_burst(self, buffer: memoryview) -> int:
        """Reads the bytes that have come. For bulk, also reads those that come meanwhile, if that does not block."""
        return os.readv(self.fd, [buffer]) if self.fd == self._origin else self._reader.read(self.fd, buffer)

    def _enlarge(self, size: int) -> None:
        """Takes a larger buffer for bulk, and a pipe that fills it, if the kernel's limits allow."""
        index = BUFFER_SIZES.index(size) + 1
        if index < len(BUFFER_SIZES):
            self._buffer = memoryview(bytearray(BUFFER_SIZES[index]))
        self.is_bulk = self._is_spliceable and size >= BUFFER_SIZES[1]
        if index == len(BUFFER_SIZES) - 1 and self._is_pipe:
            enlarge_pipe(self.fd)


class FdSink(Sink):
    """Invariant: `fd` does not block, or at most PIPE_BUF bytes are written after each poll()."""

    def __init__(self, fd: int, *, is_shared: bool = False) -> None:
        """is_shared: vsh writes its own messages there, too, so that the stream's end does not close the descriptor."""
        self._origin = fd
        self._limit = 0
        self._socket: _socket.socket | None = None
        self._is_pipe = False
        self._is_shared = is_shared
        self.is_spliceable = False
        self.fd = self._open(fd)

    def write(self, pieces: list[memoryview | bytes]) -> int:
        try:
            if self._socket is not None:
                return self._socket.sendmsg(pieces, [], _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
            if self._limit:
                return os.write(self.fd, pieces[0][: self._limit])
            return os.writev(self.fd, pieces)
        except BlockingIOError:
            return 0

    def take_from(self, conduit: Conduit, limit: int) -> int:
        try:
            return conduit.drain(self.fd, limit)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Closes a pipe when the target's stream ends, so that the pipe's reader sees the end at once."""
        if not self._is_pipe:
            return
        if self.fd != self._origin:
            os.close(self.fd)
        replace_with_null(self._origin, os.O_WRONLY)
        self.fd = self._origin
        self._is_pipe = False

    def _open(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return fd
        if stat.S_ISSOCK(mode):
            self._socket = _socket.socket(fileno=os.dup(fd))
            return fd
        self._is_pipe = stat.S_ISFIFO(mode) and not self._is_shared
        opened = _open_anew(fd, os.O_WRONLY)
        if opened == fd:
            self._limit = PIPE_BUF
        else:
            self.is_spliceable = not os.isatty(opened)
        return opened


def is_background(fd: int) -> bool:
    """True when the terminal belongs to another job: the kernel stops us if we read it or set its attributes."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        # Not a terminal, or not the one that controls us: that one stops no process of ours.
        return False


def _open_anew(fd: int, mode: int) -> int:
    """Opens the same pipe or terminal anew, non-blocking. Returns `fd` itself when that is not allowed."""
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # No /proc, or the pipe or terminal is another user's (after su).
        return fd


def replace_with_null(fd: int, mode: int) -> None:
    """Replaces `fd` by /dev/null, so that no other file can become stdin, stdout or stderr."""
    null = os.open("/dev/null", mode | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)
