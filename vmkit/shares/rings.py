"""The rings of a virtiofs device whose server has gone: every request of the guest gets an error, and none waits.

A ring is one of virtio's split ones; vmkit.vsock.vring has a primer. virtiofsd gives requests back in the order in
which it took them, so those behind the used index are the ones that wait. The guest can write all of a ring, and this
code trusts none of it.
"""

import errno
import struct
from typing import Final

from vmkit.vsock.memory import MappedMemory, MemoryFaultError
from vmkit.vsock.vring import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, RingError, RingLayout, full_fence

_DESC: Final = struct.Struct("<QIHH")
_MASK16: Final = 0xFFFF
# linux/fuse.h: the number of a request in its header, and an answer without a body.
_UNIQUE: Final = slice(8, 16)
_ANSWER: Final = struct.Struct("<Ii8s")
# Of one turn: others get theirs.
TURN_MAX: Final = 64


class FailingRing:
    """Invariant: `_next` is the first chain that has no answer yet."""

    def __init__(self, memory: MappedMemory, layout: RingLayout) -> None:
        self._memory = memory
        self._size = layout.size
        self._has_event_idx = layout.has_event_idx
        self._desc = layout.desc
        self._avail = layout.avail.cast("H")
        self._used16 = layout.used.cast("H")
        self._used32 = layout.used[4 : 4 + 8 * layout.size].cast("I")
        self._next = self._used16[1]

    @property
    def base(self) -> int:
        """The index of the next chain: the answer to GET_VRING_BASE."""
        return self._next

    def work(self) -> bool:
        """Answers what waits, up to TURN_MAX, and asks for a kick. True when more waits. Raises RingError."""
        for _ in range(TURN_MAX):
            if not self._count():
                break
            self._answer(self._avail[2 + self._next % self._size])
        if self._has_event_idx:
            self._used16[2 + 4 * self._size] = self._next
        else:
            self._used16[0] = 0
        full_fence()
        return self._count() > 0

    def _count(self) -> int:
        count: int = (self._avail[1] - self._next) & _MASK16
        if count > self._size:
            raise RingError(f"the available index jumped by {count} in a ring of {self._size}")
        return count

    def _answer(self, head: int) -> None:
        if head >= self._size:
            raise RingError(f"descriptor {head} in a ring of {self._size}")
        readable, writable = b"", None
        for address, length, flags in self._walk(head):
            try:
                if flags & DESC_F_WRITE:
                    writable = self._memory.find(address, length)
                    break
                readable += bytes(self._memory.find(address, min(length, _UNIQUE.stop)))[: _UNIQUE.stop - len(readable)]
            except MemoryFaultError as error:
                raise RingError(str(error)) from error
        written = 0
        # Some requests, such as FORGET, have no answer.
        if writable is not None and len(writable) >= _ANSWER.size:
            written = _ANSWER.size
            unique = readable[_UNIQUE].ljust(8, b"\0")
            writable[:written] = _ANSWER.pack(written, -errno.ENOTCONN, unique)
        slot = self._next % self._size
        self._used32[2 * slot] = head
        self._used32[2 * slot + 1] = written
        self._next = (self._next + 1) & _MASK16
        # The element is written before the index that shows it.
        full_fence()
        self._used16[1] = self._next

    def _walk(self, head: int) -> list[tuple[int, int, int]]:
        """The descriptors of a chain: address, length and flags. Raises RingError."""
        found: list[tuple[int, int, int]] = []
        table, count, index = self._desc, self._size, head
        is_indirect = False
        for _ in range(self._size + 1):
            address, length, flags, following = _DESC.unpack_from(table, DESC_SIZE * index)
            if flags & DESC_F_INDIRECT:
                if is_indirect or flags & DESC_F_NEXT:
                    raise RingError("an indirect table within a chain or a table")
                table, count, index, is_indirect = self._read_table(address, length), length // DESC_SIZE, 0, True
                continue
            found.append((address, length, flags))
            if not flags & DESC_F_NEXT:
                return found
            if following >= count:
                raise RingError(f"a chain that leads to descriptor {following} of {count}")
            index = following
        raise RingError("a chain with a loop")

    def _read_table(self, address: int, length: int) -> memoryview:
        """A copy, which the guest cannot change during the walk."""
        if length % DESC_SIZE or not 0 < length // DESC_SIZE <= self._size:
            raise RingError(f"an indirect table of {length} bytes")
        try:
            return memoryview(bytes(self._memory.find(address, length)))
        except MemoryFaultError as error:
            raise RingError(str(error)) from error
