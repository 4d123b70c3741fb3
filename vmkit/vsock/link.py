"""The host program's end of one connection: its socket, and the guest's bytes that it has not taken yet.

It reads and writes its own socket, straight from and to the guest's memory. It knows nothing of rings, epoll or the
protocol.
"""

import mmap
import socket
from contextlib import suppress
from typing import Final

from vmkit.vsock.buffers import IOV_MAX
from vmkit.vsock.connection import VsockConnection

# Read from a socket in one go, in buffers of the guest; grows while reads come back full. More gained nothing.
MAX_BATCH: Final = 64
# What bytes that programs do not take must leave of the process's memory: an arena of Python's allocator has 1 MiB, and
# without one any statement can fail, and the device with it.
HEADROOM_BYTES: Final = 2 << 20


class Link:
    """One connection's host side.

    Invariant: bytes leave in the order in which they came, those of `_outbox` before those of `_views`. The views
    point into the guest's memory, and flush() empties them before the guest gets that memory back.
    """

    __slots__ = (
        "_outbox",
        "_view_bytes",
        "_views",
        "batch",
        "connection",
        "ends_after_flush",
        "guest_port",
        "is_deaf",
        "is_hung_up",
        "is_queued",
        "is_read_to_end",
        "is_readable",
        "is_starved",
        "is_touched",
        "is_watching_writes",
        "sock",
        "starved_rounds",
    )

    def __init__(self, connection: VsockConnection, sock: socket.socket | None) -> None:
        self.connection = connection
        self.sock = sock
        # The port a host program asked for, once it has.
        self.guest_port = 0
        self._outbox = bytearray()
        self._views: list[memoryview] = []
        self._view_bytes = 0
        self.batch = 1
        self.is_readable = False
        # A read that does not fill its buffers does not mean that nothing is left.
        self.is_read_to_end = False
        # The program closed its end altogether; what it wrote before can still be read.
        self.is_hung_up = False
        # The program takes no more bytes.
        self.is_deaf = False
        # Bytes wait for the guest's credit.
        self.is_starved = False
        # How often the driver's rounds found it so.
        self.starved_rounds = 0
        # Marks of the driver: in its queue for the guest, in its list of sockets to write to, in epoll for writing.
        self.is_queued = False
        self.is_touched = False
        self.is_watching_writes = False
        self.ends_after_flush = False

    @property
    def pending_bytes(self) -> int:
        """Bytes of the guest that are not written yet."""
        return len(self._outbox) + self._view_bytes

    def add(self, views: list[memoryview], size_bytes: int) -> None:
        """Takes the guest's bytes, as pieces of its memory; flush() follows before that memory is given back."""
        self._views += views
        self._view_bytes += size_bytes

    def flush(self) -> int:
        """Writes what the program takes now and keeps a copy of the rest; returns how many bytes left, taken or lost.

        A program that closed or shut its reading side loses them, and is_deaf is True. Raises MemoryError; the copy
        has a gap then.
        """
        before = len(self._outbox) + self._view_bytes
        try:
            if self.sock is None or self.is_deaf:
                raise BrokenPipeError
            if self._outbox:
                self._flush_outbox(self.sock)
            if not self._outbox and self._views:
                self._flush_views(self.sock)
        except BlockingIOError:
            pass
        except OSError:
            self.is_deaf = True
            self.drop_pending()
        if self._views:
            _require_headroom()
            for view in self._views:
                self._outbox += view
            self._views.clear()
        self._view_bytes = 0
        return before - len(self._outbox)

    def drop_pending(self) -> None:
        """Drops the pending bytes: the program will not take them any more."""
        self._outbox.clear()
        self._views.clear()
        self._view_bytes = 0

    def _flush_outbox(self, sock: socket.socket) -> None:
        with memoryview(self._outbox) as view:
            sent = sock.send(view, socket.MSG_NOSIGNAL)
        del self._outbox[:sent]

    def _flush_views(self, sock: socket.socket) -> None:
        views = self._views
        while views:
            chunk = views[:IOV_MAX]
            sent = sock.sendmsg(chunk, (), socket.MSG_NOSIGNAL)
            if sent == self._view_bytes:
                views.clear()
                return
            self._view_bytes -= sent
            count = 0
            for view in chunk:
                if sent < len(view):
                    break
                sent -= len(view)
                count += 1
            del views[:count]
            if count < len(chunk):
                # A part was taken: the socket is full.
                views[0] = views[0][sent:]
                return

    def shut(self, how: int) -> None:
        """Half-closes the socket. Ignores one that is closed already."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(how)

    def is_at_end(self) -> bool:
        """Whether the program's end comes next, with no byte before it."""
        if not self.is_read_to_end or self.sock is None:
            return False
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return False

    def read_into(self, buffers: list[memoryview], room_bytes: int) -> int | None:
        """Reads the program's bytes into the buffers; 0 at its end, None while there are none.

        Raises OSError when it broke.
        """
        if self.sock is None:
            return 0
        try:
            size_bytes, _ancillary, flags, _address = self.sock.recvmsg_into(buffers)
        except BlockingIOError:
            self.is_readable = False
            return None
        # Descriptors that a program passes are dropped by the kernel, but they end a read where they stood.
        self.is_readable = size_bytes == room_bytes or self.is_read_to_end or flags != 0
        return size_bytes


def _require_headroom() -> None:
    """Raises MemoryError when the process cannot take HEADROOM_BYTES now. It asks the kernel and uses none of it."""
    try:
        mmap.mmap(-1, HEADROOM_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError from error
