"""One stream of the target's output, on its way into the connection.

Owns our end of it. What was read last is referenced by the connection's output, not copied: until that is gone nothing
more is read. Bulk goes through a sluice, and only its frames' heads are written from here.
"""

import os

from vshd.carry.burst import BurstReader
from vshd.carry.conduit import Sluice, enlarge_pipe, open_sluice
from vshd.wire.server import ServerConnection

# What is read at once, in steps: see vshd.wire.buffers.
CHUNK_SIZES = (1 << 13, 1 << 16)
# 16 legacy frames: one writev().
LEGACY_READ_SIZE = 16 * 4000


class Outflow:
    """Invariant: `fd` is -1 once the stream has ended; while `is_sending`, what was read last may still be in the
    connection's output. The code that opened a terminal closes it.
    """

    def __init__(self, connection: ServerConnection, stream: int, fd: int, *, is_terminal: bool) -> None:
        self.fd = fd
        self.stream = stream
        self.is_sending = False
        # Bytes that were read.
        self.passed = 0
        self._connection = connection
        self._is_terminal = is_terminal
        self._reader = BurstReader()
        self._chunk: memoryview | None = None
        # What bulk goes through instead of the chunk, while it is bulk.
        self._sluice: Sluice | None = None
        self._is_bulk = False
        # A peer that wants small frames gets them as cheaply by copying.
        self._can_splice = connection.is_extended and not is_terminal and connection.max_data >= CHUNK_SIZES[1]

    @property
    def can_read(self) -> bool:
        """There is somewhere to go for output, and its chunk is free."""
        return self.fd >= 0 and not self.is_sending and self._connection.send_room(self.stream) > 0

    def read(self) -> bool:
        """Sends what there is; False at the end. Raises BlockingIOError when there is nothing now."""
        room = self._connection.send_room(self.stream)
        try:
            if self._is_bulk and self._sluice is not None:
                return self._pass(self._sluice, room)
            return self._copy(room)
        except BlockingIOError:
            raise
        except OSError:
            # EIO: the terminal has no other end any more.
            return False

    def end(self) -> None:
        """The stream has ended; what of it is on its way still goes."""
        fd, self.fd = self.fd, -1
        if not self._is_terminal:
            os.close(fd)
        self._connection.send_end(self.stream)

    def close(self) -> None:
        """Lets go of everything."""
        if self.fd >= 0 and not self._is_terminal:
            os.close(self.fd)
        self.fd = -1
        if self._sluice is not None:
            self._sluice.close()
            self._sluice = None

    def _copy(self, room: int) -> bool:
        chunk = self._chunk
        if chunk is None:
            chunk = self._chunk = memoryview(bytearray(CHUNK_SIZES[0]))
        size = self._reader.read(self.fd, chunk if room >= len(chunk) else chunk[:room])
        if not size:
            return False
        self._connection.send_data(self.stream, chunk[:size])
        self.is_sending = True
        self.passed += size
        if size == len(chunk) and not self._begin_bulk(size):
            self._enlarge_chunk(size)
        return True

    def _pass(self, sluice: Sluice, room: int) -> bool:
        """As much as one frame carries, past this process's memory."""
        connection = self._connection
        size = self._reader.fill(sluice, self.fd, min(room, connection.max_data))
        if not size:
            return False
        sluice.append_to(connection.output, connection.begin_data(self.stream, size))
        self.is_sending = True
        self.passed += size
        # What is small is read and written with fewer calls.
        self._is_bulk = size >= CHUNK_SIZES[0]
        return True

    def _begin_bulk(self, size: int) -> bool:
        """After a chunk that was filled: whether a sluice is used from now on."""
        if size < CHUNK_SIZES[1] or not self._can_splice:
            return False
        if self._sluice is None:
            enlarge_pipe(self.fd)
            self._sluice = open_sluice()
        self._is_bulk = self._can_splice = self._sluice is not None
        return self._is_bulk

    def _enlarge_chunk(self, size: int) -> None:
        """A chunk that was filled is followed by a larger one, up to what one frame (or one writev()) carries."""
        limit = self._connection.max_data if self._connection.is_extended else LEGACY_READ_SIZE
        larger = min(limit, CHUNK_SIZES[1] if size < CHUNK_SIZES[1] else limit)
        if larger > size:
            self._chunk = memoryview(bytearray(larger))
        if size == CHUNK_SIZES[1] and not self._is_terminal:
            enlarge_pipe(self.fd)
