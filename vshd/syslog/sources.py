"""Where the log of a guest comes from: the socket /dev/log, and the kernel's log at /dev/kmsg.

Who wrote a line is the kernel's word (SCM_CREDENTIALS, unix(7)). Only root can claim to be another process.
"""

import _socket
import os
import struct
import time

from vshd.carry.records import HAS_WRITER, IS_CUT, KERNEL, SYSLOG, TEXT_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # Source, flags, time in nanoseconds since 1970, (pid, uid, gid), text.
    Add = Callable[[int, int, int, tuple[int, int, int], bytes], None]

# linux/socket.h, which the module _socket lacks on some Pythons
SCM_CREDENTIALS = 2
SOL_SOCKET, MSG_TRUNC = _socket.SOL_SOCKET, _socket.MSG_TRUNC
_WRITER = struct.Struct("iII")
WRITER_SIZE = _WRITER.size
_SPACE = _socket.CMSG_SPACE(WRITER_SIZE)
NOBODY = (0, 0, 0)
# Records of one source before another one has its turn.
AT_ONCE = 256
# The head of a record of /dev/kmsg: `6,339,5140900,-;text` (Documentation/ABI/testing/dev-kmsg).
KERNEL_HEAD_MAX = 64


class SocketSource:
    """A datagram socket that programs send their lines to, each with its writer."""

    __slots__ = ("_kind", "_socket", "fd")

    def __init__(self, socket: _socket.socket, kind: int = SYSLOG) -> None:
        self._socket = socket
        self._kind = kind
        self.fd = socket.fileno()

    def read(self, add: "Add") -> bool:
        """Takes what waits, AT_ONCE lines at most. Returns whether that was all. Raises OSError."""
        # Names of this function: a busy guest spends its time here.
        receive, kind, now_ns, unpack = self._socket.recvmsg, self._kind, time.time_ns, _WRITER.unpack
        for _ in range(AT_ONCE):
            try:
                # No room for more than the writer: descriptors that a program sends along are closed by the kernel.
                text, words, flags, _ = receive(TEXT_MAX, _SPACE)
            except BlockingIOError:
                return True
            marks, writer = IS_CUT if flags & MSG_TRUNC else 0, NOBODY
            for level, word, data in words:
                if word == SCM_CREDENTIALS and level == SOL_SOCKET and len(data) == WRITER_SIZE:
                    marks, writer = marks | HAS_WRITER, unpack(data)
            add(kind, marks, now_ns(), writer, text)
        return False


class KernelSource:
    """The kernel's log, from its oldest record on. `lost` counts the records that the kernel overwrote before."""

    __slots__ = ("_next", "fd", "lost")

    def __init__(self, fd: int) -> None:
        """fd: of /dev/kmsg, non-blocking; this object's from here on."""
        self.fd = fd
        self.lost = 0
        self._next = -1

    def read(self, add: "Add") -> bool:
        """Takes what waits, AT_ONCE records at most. Returns whether that was all. Raises OSError."""
        # Between the kernel's time and the one since 1970.
        ahead_ns = time.time_ns() - time.monotonic_ns()
        for _ in range(AT_ONCE):
            try:
                record = os.read(self.fd, TEXT_MAX)
            except BlockingIOError:
                return True
            except BrokenPipeError:
                # The next read() has the oldest record that is left, and its number tells how many are gone.
                continue
            if not record:
                return True
            words = record[:KERNEL_HEAD_MAX].split(b",", 3)
            try:
                number, time_us = int(words[1]), int(words[2])
            except (IndexError, ValueError):
                continue
            if 0 <= self._next < number:
                self.lost += number - self._next
            self._next = number + 1
            add(KERNEL, 0, max(0, time_us * 1000 + ahead_ns), NOBODY, record)
        return False
