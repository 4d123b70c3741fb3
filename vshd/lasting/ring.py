"""The output of a lasting session, as far as it is kept: the last bytes of both streams, each with its offset.

Offsets count all bytes of the session, of both streams, in the order in which they were read. Owns the store. Knows
nothing of who reads.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# After so many further bytes a store looks again whether the guest has memory.
LOOK_EVERY = 1 << 20
# Places where one stream follows the other: with more, the oldest output goes although there is room for it.
MARKS_MAX = 4096


class MemoryStore:
    """Bytes in memory. It grows with what is written, up to `size`, which is less where memory is short."""

    def __init__(self, size: int, has_memory: "Callable[[], bool]" = lambda: True) -> None:
        """has_memory: whether the guest has some to spare."""
        self.size = size
        self._has_memory = has_memory
        self._look_at = LOOK_EVERY
        self._bytes = bytearray()

    def settle(self) -> None:
        """Before a write at the end: where memory is short, what is held is all that there will be."""
        held = len(self._bytes)
        if self._look_at <= held < self.size:
            self._look_at = held + LOOK_EVERY
            if not self._has_memory():
                self.size = held

    def write(self, position: int, data: memoryview) -> None:
        """Raises MemoryError."""
        held = len(self._bytes)
        if position < held:
            self._bytes[position : position + len(data)] = data
            return
        # Behind a write that failed there is a hole, of bytes that no client reads.
        self._bytes += bytes(position - held)
        self._bytes += data

    def read(self, position: int, size: int) -> bytes:
        return bytes(self._bytes[position : position + size])

    def close(self) -> None:
        self._bytes = bytearray()


class FileStore:
    """Bytes in a file of the guest, which no other program should change."""

    def __init__(self, path: bytes, size: int) -> None:
        """Makes the file. Raises OSError: it must not exist yet."""
        self.size = size
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def settle(self) -> None:
        """A disk that is full is met when it is written to."""

    def write(self, position: int, data: memoryview) -> None:
        """Raises OSError."""
        while data:
            size = os.pwrite(self._fd, data, position)
            position, data = position + size, data[size:]

    def read(self, position: int, size: int) -> bytes:
        """Raises OSError."""
        return os.pread(self._fd, size, position)

    def close(self) -> None:
        os.close(self._fd)


class Ring:
    """Invariant: the bytes from `start` up to `end` are in the store; `_marks` are the offsets where a stream begins,
    each with the stream, in order, and the first is not above `start` unless nothing is kept.
    """

    def __init__(self, store: "MemoryStore | FileStore") -> None:
        self.start = 0
        self.end = 0
        self.store = store
        self._marks: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        """How many bytes it can keep."""
        return self.store.size

    def append(self, stream: int, data: memoryview) -> None:
        """Takes what a stream said. What the store does not take is dropped, with all before it."""
        self.store.settle()
        first = self.end
        self.end += len(data)
        kept = data[-self.size :]
        try:
            self._write(self.end - len(kept), kept)
        except (OSError, MemoryError):
            self._drop(self.end)
            return
        if not self._marks or self._marks[-1][1] != stream:
            self._marks.append((first, stream))
        self._drop(max(self.start, self.end - self.size))
        if len(self._marks) > MARKS_MAX:
            self._drop(self._marks[len(self._marks) - MARKS_MAX][0])

    def read(self, offset: int, size: int) -> tuple[int, bytes]:
        """The stream of the byte at `offset`, which is kept, and at most `size` bytes of that stream from there on."""
        assert self.start <= offset < self.end
        index = self._find(offset)
        stop = self._marks[index + 1][0] if index + 1 < len(self._marks) else self.end
        position = offset % self.size
        size = min(size, stop - offset, self.size - position)
        try:
            data = self.store.read(position, size)
        except OSError:
            data = b""
        # Someone has cut the file: the places of bytes count, so that offsets stay right.
        return self._marks[index][1], data + bytes(size - len(data))

    def _write(self, offset: int, data: memoryview) -> None:
        position = offset % self.size
        head = data[: self.size - position]
        self.store.write(position, head)
        if len(head) < len(data):
            self.store.write(0, data[len(head) :])

    def _drop(self, start: int) -> None:
        self.start = start
        self._marks = self._marks[self._find(start) :] if start < self.end else []

    def _find(self, offset: int) -> int:
        """The mark that the byte at `offset` is behind."""
        low, high = 0, len(self._marks)
        while high - low > 1:
            middle = (low + high) // 2
            if self._marks[middle][0] <= offset:
                low = middle
            else:
                high = middle
        return low
