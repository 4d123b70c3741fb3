"""One split virtqueue over shared memory, device side. The guest can write all of it, and this code trusts none of it.

Primer
======
Three arrays in guest RAM. The *descriptor table* has `size` entries of 16 bytes: address, length, flags, next.
Descriptors are linked to *chains*, one buffer each. The driver puts the head of a chain into the *available* ring and
moves its index; the device puts the head back into the *used* ring, with the number of bytes written, and moves that
index. Indices run modulo 2**16, slots are index modulo size.

Each side can ask for a wake-up. With EVENT_IDX each side writes the index at which it needs one: the driver's
`used_event` behind the available ring, ours (`avail_event`) behind the used ring. Without it there is one flag each
way. To sleep safely, a side asks for the wake-up *and then* checks once more. Between the two stands a full fence, on
both sides.

Faults of a hostile driver
==========================
These raise RingError: heads and links beyond the table, loops, addresses outside RAM, tables within tables, readable
buffers where writable ones belong, and an available index that jumps further than the ring is long. The ring is then
broken until the driver resets the device, as with the kernel's own vhost. This code reads each word of shared memory
once, and uses the word that it checked. A chain may have at most `size` descriptors, so that a walk ends (virtio 1.2,
2.7.5.3.1 forbids longer ones).

Specification: virtio 1.2, section 2.7.
"""

import struct
from _thread import allocate_lock
from collections import deque
from typing import Final

from vmkit.vsock.memory import MappedMemory, MemoryFaultError

DESC_SIZE: Final = 16
DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
_DESC: Final = struct.Struct("<QIHH")

AVAIL_F_NO_INTERRUPT: Final = 1
USED_F_NO_NOTIFY: Final = 1

# As QEMU's VIRTQUEUE_MAX_SIZE; also keeps every chain within IOV_MAX of one readv or writev.
MAX_RING_SIZE: Final = 1024
# Pieces of RAM that are read ahead, and one chain more. Each costs some 200 bytes, and a driver may cut its buffers
# into single bytes. Linux's need at most some 2300 for the chains of one turn.
MAX_SEGMENTS_AHEAD: Final = 4096

_MASK16: Final = 0xFFFF
# The signalled index trails the used one by at most this, so that distances stay meaningful modulo 2**16.
_MAX_UNSIGNALLED: Final = 0x4000

_fence_lock = allocate_lock()


class RingError(Exception):
    """The driver broke a rule of the ring, which the text names. The ring must not be used further."""


def full_fence() -> None:
    """Makes our writes visible before our next reads: a lock's atomic instruction, a full barrier on x86-64.

    Where it is no full barrier, the second check before every sleep and the timed wake-up do the work (backend.py).
    """
    _fence_lock.acquire()
    _fence_lock.release()


class RingLayout:
    """The place and the negotiated features of a ring: checked once, before the ring runs."""

    __slots__ = ("avail", "desc", "has_event_idx", "has_indirect", "size", "used")

    def __init__(
        self,
        memory: MappedMemory,
        size: int,
        addresses: tuple[int, int, int],
        *,
        has_event_idx: bool,
        has_indirect: bool,
    ) -> None:
        """`addresses`: of the descriptor table, the available ring and the used ring, in the front-end's process.

        Raises RingError.
        """
        if not 0 < size <= MAX_RING_SIZE or size & (size - 1):
            raise RingError(f"ring size {size}")
        desc, avail, used = addresses
        if desc % 16 or avail % 2 or used % 4:
            raise RingError(f"ring addresses {desc:#x}, {avail:#x}, {used:#x} are not aligned")
        self.size = size
        self.has_event_idx = has_event_idx
        self.has_indirect = has_indirect
        try:
            self.desc = memory.find_front(desc, DESC_SIZE * size)
            # Flags, index and event word: three times 2 bytes.
            self.avail = memory.find_front(avail, 6 + 2 * size)
            self.used = memory.find_front(used, 6 + 8 * size)
        except MemoryFaultError as error:
            raise RingError(str(error)) from error


class Chain:
    """One buffer of the driver, checked: its head, for giving it back, and its pieces of RAM in order.

    `payload` and `room` belong to the code that fills the buffer: they keep its division, computed once.
    """

    __slots__ = ("head", "payload", "room", "segments")

    def __init__(self, head: int, segments: list[memoryview]) -> None:
        self.head = head
        self.segments = segments
        self.payload: list[memoryview] = []
        self.room = 0


class Vring:
    """A running ring.

    Invariant: `base` counts the chains given back. A resumed ring reads those in `waiting` again.
    """

    __slots__ = (
        "_avail",
        "_desc",
        "_direction",
        "_event_slot",
        "_has_event_idx",
        "_has_indirect",
        "_last_avail",
        "_memory",
        "_segments_ahead",
        "_used16",
        "_used32",
        "published_idx",
        "signalled",
        "size",
        "used_idx",
        "waiting",
    )

    def __init__(self, memory: MappedMemory, layout: RingLayout, *, base: int, is_writable: bool) -> None:
        """base: the index of the first available chain to read. is_writable: whether the device writes into chains."""
        size = layout.size
        self.size = size
        self._memory = memory
        self._has_event_idx = layout.has_event_idx
        self._has_indirect = layout.has_indirect
        self._direction = DESC_F_WRITE if is_writable else 0
        # Casts make fields items: no struct, no copies, and each access is one load or store.
        self._desc = layout.desc.cast("Q")
        self._avail = layout.avail.cast("H")
        # The used elements start at byte 4, their counterpart of 16 bit words spans the whole ring.
        self._used16 = layout.used.cast("H")
        self._used32 = layout.used[4 : 4 + 8 * size].cast("I")
        self._event_slot = 2 + 4 * size
        self._last_avail = base & _MASK16
        # Written by push_used(), shown to the driver by publish(), and the last one it got an interrupt for.
        self.used_idx = self.published_idx = self.signalled = self._used16[1]
        # Chains that were read ahead and not given back, and how many pieces they have together.
        self.waiting: deque[Chain] = deque()
        self._segments_ahead = 0

    # Taking chains.

    @property
    def base(self) -> int:
        """The index of the first chain that was not given back: the answer to GET_VRING_BASE."""
        return (self._last_avail - len(self.waiting)) & _MASK16

    def available(self) -> int:
        """Returns how many of the driver's chains are not read yet. Raises RingError when its index jumped."""
        count: int = (self._avail[1] - self._last_avail) & _MASK16
        if count > self.size:
            raise RingError(f"the available index jumped by {count} in a ring of {self.size}")
        return count

    def peek(self, count: int) -> deque[Chain]:
        """Reads chains ahead until `count` wait, all are read, or MAX_SEGMENTS_AHEAD is reached.

        The ring keeps them until push_used() takes them one by one.
        """
        waiting = self.waiting
        missing = count - len(waiting)
        if missing > 0:
            offered = self.available()
            for _ in range(missing if missing < offered else offered):
                if self._segments_ahead >= MAX_SEGMENTS_AHEAD:
                    break
                chain = self._read_next()
                self._segments_ahead += len(chain.segments)
                waiting.append(chain)
        return waiting

    @property
    def read_idx(self) -> int:
        """The index of the next chain to read. It moves with every chain that peek() reads."""
        return self._last_avail

    @property
    def has_chain(self) -> bool:
        """Whether peek() would return a chain now."""
        return bool(self.waiting) or self.available() > 0

    def _read_next(self) -> Chain:
        head = self._avail[2 + self._last_avail % self.size]
        if head >= self.size:
            raise RingError(f"descriptor {head} in a ring of {self.size}")
        word = self._desc[2 * head + 1]
        try:
            length = word & 0xFFFFFFFF
            if length and word >> 32 & _MASK16 == self._direction:
                # One direct descriptor: what Linux's driver offers for receiving.
                segments = [self._memory.find(self._desc[2 * head], length)]
            else:
                segments = self._read_chain(head)
        except MemoryFaultError as error:
            raise RingError(str(error)) from error
        self._last_avail = (self._last_avail + 1) & _MASK16
        return Chain(head, segments)

    def _read_chain(self, head: int) -> list[memoryview]:
        segments: list[memoryview] = []
        index = head
        for _ in range(self.size):
            address, word = self._desc[2 * index], self._desc[2 * index + 1]
            length, flags, following = word & 0xFFFFFFFF, word >> 32 & _MASK16, word >> 48
            if flags & DESC_F_INDIRECT:
                if flags & DESC_F_NEXT:
                    raise RingError("a descriptor with both INDIRECT and NEXT")
                self._read_table(address, length, segments)
                return segments
            self._add_segment(segments, address, length, flags)
            if not flags & DESC_F_NEXT:
                return segments
            if following >= self.size:
                raise RingError(f"a chain that leads to descriptor {following} in a ring of {self.size}")
            index = following
        raise RingError("a chain with a loop")

    def _read_table(self, address: int, length: int, segments: list[memoryview]) -> None:
        """Reads an indirect table. Copies it out whole, so that the guest cannot change it during the walk."""
        if not self._has_indirect:
            raise RingError("an indirect descriptor although none were agreed on")
        count = length // DESC_SIZE
        if length % DESC_SIZE or not 0 < count <= self.size:
            raise RingError(f"an indirect table of {length} bytes")
        table = list(_DESC.iter_unpack(bytes(self._memory.find(address, length))))
        index = 0
        for _ in range(count):
            entry_address, entry_length, flags, following = table[index]
            if flags & DESC_F_INDIRECT:
                raise RingError("an indirect table within an indirect table")
            self._add_segment(segments, entry_address, entry_length, flags)
            if not flags & DESC_F_NEXT:
                break
            if following >= count:
                raise RingError(f"a chain that leads to entry {following} in an indirect table of {count}")
            index = following
        else:
            raise RingError("an indirect table with a loop")
        if len(segments) > self.size:
            raise RingError(f"a chain of {len(segments)} descriptors in a ring of {self.size}")

    def _add_segment(self, segments: list[memoryview], address: int, length: int, flags: int) -> None:
        if flags & DESC_F_WRITE != self._direction:
            raise RingError("a buffer for reading where one for writing belongs, or the reverse")
        if length:
            segments.append(self._memory.find(address, length))

    # Giving chains back.

    def push_used(self, written_bytes: int) -> None:
        """Gives the oldest peeked chain back; the driver sees it after publish()."""
        chain = self.waiting.popleft()
        self._segments_ahead -= len(chain.segments)
        slot = self.used_idx % self.size
        self._used32[2 * slot] = chain.head
        self._used32[2 * slot + 1] = written_bytes
        self.used_idx = (self.used_idx + 1) & _MASK16

    @property
    def held_count(self) -> int:
        """Returns how many chains were pushed and not published."""
        return (self.used_idx - self.published_idx) & _MASK16

    def publish(self) -> bool:
        """Shows the driver the pushed chains; True when it asked for an interrupt.

        The elements are written already; this writes the index, last of all.
        """
        if self.published_idx == self.used_idx:
            return False
        self.published_idx = self._used16[1] = self.used_idx
        full_fence()
        return self.is_interrupt_due()

    def is_interrupt_due(self) -> bool:
        """Whether the driver waits for an interrupt it did not get. publish() and every sleep check it.

        The distance counts from the last interrupt, not from the last check. So the next check still finds a request
        that the driver makes during this one.
        """
        published = self.published_idx
        behind = (published - self.signalled) & _MASK16
        if not behind:
            return False
        if self._has_event_idx:
            used_event = self._avail[2 + self.size]
            is_due = (published - used_event - 1) & _MASK16 < behind
        else:
            is_due = not self._avail[0] & AVAIL_F_NO_INTERRUPT
        if is_due:
            self.signalled = published
        elif behind > _MAX_UNSIGNALLED:
            self.signalled = (published - _MAX_UNSIGNALLED) & _MASK16
        return is_due

    # Being woken.

    def request_kick(self) -> bool:
        """Asks the driver for a kick at its next chain.

        True when a chain is available already: the driver sends no kick for that one.
        """
        if self._has_event_idx:
            self._used16[self._event_slot] = self._last_avail
        else:
            self._used16[0] = 0
        full_fence()
        return self.available() > 0

    def decline_kicks(self) -> None:
        """Declines kicks while the loop polls the ring. With EVENT_IDX the stale event index does so already."""
        if not self._has_event_idx:
            self._used16[0] = USED_F_NO_NOTIFY
