"""This process's own stdin, stdout and stderr, as a source and sinks that never block and never disturb others.

O_NONBLOCK belongs to the open file, which the shell and its other children share: it is never set on these descriptors.
Pipes and terminals are opened anew through /proc instead; where that is not allowed, writes after poll() stay below
the size a pipe always takes.
"""

import _socket
import os
import stat

from vsh.pump import Sink, Source

# A pipe that poll() calls writable takes this much without blocking (limits.h, pipe(7)).
PIPE_BUF = 4096


class FdSource(Source):
    """A descriptor read after poll() said so: of whatever kind, its end is the end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, limit: int) -> bytes | None:
        try:
            return os.read(self.fd, limit)
        except BlockingIOError:
            return None
        except OSError:
            # A closed descriptor, a directory, a terminal that is gone: there is nothing more to read.
            return b""


class NoSource(Source):
    """No stdin at all: the end at once."""

    def read(self, limit: int) -> bytes:
        return b""


class FdSink(Sink):
    """Invariant: `fd` does not block, or at most PIPE_BUF bytes are written after each poll()."""

    def __init__(self, fd: int) -> None:
        self._origin = fd
        self._limit = 0
        self._socket: _socket.socket | None = None
        self._is_pipe = False
        self.fd = self._open(fd)

    def write(self, data: memoryview) -> int:
        piece = data[: self._limit] if self._limit else data
        try:
            if self._socket is not None:
                return self._socket.send(piece, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
            return os.write(self.fd, piece)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """A pipe's reader should see the end as soon as the target's stream has it."""
        if not self._is_pipe:
            return
        null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        if self.fd != self._origin:
            os.close(self.fd)
        os.dup2(null, self._origin)
        os.close(null)
        self.fd = self._origin
        self._is_pipe = False

    def _open(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return fd
        if stat.S_ISSOCK(mode):
            self._socket = _socket.socket(fileno=os.dup(fd))
            return fd
        self._is_pipe = stat.S_ISFIFO(mode)
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            # No /proc, or the pipe or terminal is another user's (after su).
            self._limit = PIPE_BUF
            return fd


class NullSink(Sink):
    """For a descriptor that is not open: output goes nowhere, as for any program started so."""

    def write(self, data: memoryview) -> int:
        return len(data)


def open_source(fd: int = 0) -> Source:
    """stdin, of any kind; the end at once when it is not open."""
    try:
        os.fstat(fd)
    except OSError:
        return NoSource()
    return FdSource(fd)


def open_sink(fd: int) -> Sink:
    """stdout or stderr."""
    try:
        return FdSink(fd)
    except OSError:
        return NullSink()
