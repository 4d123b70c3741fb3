"""The newest records of a guest's log, in memory, until the host has read them and for some time after. No I/O."""

# All of them, encoded. Some 8,000 lines of usual length: what a guest logs before the host comes, or within a second.
SIZE_MAX = 1 << 20
# Each record is an object, and a short one is smaller than the object.
COUNT_MAX = 1 << 14


class KeptRecords:
    """Invariant: `_records` are those with the numbers from `first` to `next` - 1, and `_size` bytes."""

    __slots__ = ("_count_max", "_head", "_records", "_size", "_size_max", "first", "next")

    def __init__(self, size_max: int = SIZE_MAX, count_max: int = COUNT_MAX) -> None:
        # A list whose first `_head` places are free. collections.deque would be a module more.
        self._records: list[bytes] = []
        self._head = 0
        self._size = 0
        self._size_max = size_max
        self._count_max = count_max
        self.first = 0
        # Counted, and not found anew: each line of a guest asks for it.
        self.next = 0

    def add(self, record: bytes) -> None:
        """Keeps a record; forgets the oldest ones where that needs room."""
        self._records.append(record)
        self.next += 1
        self._size += len(record)
        while self._size > self._size_max or self.next - self.first > self._count_max:
            self._size -= len(self._records[self._head])
            self._records[self._head] = b""
            self._head += 1
            self.first += 1
        if self._head > self._count_max:
            del self._records[: self._head]
            self._head = 0

    def take(self, number: int, size: int) -> tuple[bytes, int]:
        """The records from this number on, as many as `size` bytes hold but one at least; and the number after them.

        Where the first of them are forgotten, it begins with the oldest that is kept.
        """
        index = start = self._head + max(0, number - self.first)
        records = self._records
        while index < len(records) and size > 0:
            size -= len(records[index])
            index += 1
        return b"".join(records[start:index]), self.first + index - self._head
