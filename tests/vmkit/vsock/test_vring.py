"""A split ring in memory that the test owns: what a driver may do, and what a hostile one does."""

import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmkit.vsock.memory import MappedMemory, MemoryFaultError, RegionSpec, map_memory
from vmkit.vsock.vring import Chain, RingError, RingLayout, Vring

SIZE = 8
RAM = 0x10000
GUEST_BASE = 0x1000
FRONT_BASE = 0x7F0000000000
DESC, AVAIL, USED, TABLE, DATA = 0x100, 0x200, 0x300, 0x400, 0x1000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Arena:
    """RAM with one ring, written with a driver's hand."""

    def __init__(self, *, has_event_idx: bool = True, has_indirect: bool = True, is_writable: bool = False) -> None:
        self.fd = os.memfd_create("arena")
        os.ftruncate(self.fd, RAM)
        self.memory = map_memory([RegionSpec(GUEST_BASE, RAM, FRONT_BASE, 0)], [self.fd])
        self.ram = self.memory.find_front(FRONT_BASE, RAM)
        self.is_writable = is_writable
        self.layout = RingLayout(
            self.memory,
            SIZE,
            (FRONT_BASE + DESC, FRONT_BASE + AVAIL, FRONT_BASE + USED),
            has_event_idx=has_event_idx,
            has_indirect=has_indirect,
        )
        self.avail_idx = 0
        self.ring = self.restart(0)

    def restart(self, base: int) -> Vring:
        self.ring = Vring(self.memory, self.layout, base=base, is_writable=self.is_writable)
        return self.ring

    def write(self, offset: int, data: bytes) -> None:
        self.ram[offset : offset + len(data)] = data

    def u16(self, offset: int) -> int:
        return int(struct.unpack_from("<H", self.ram, offset)[0])

    def desc(self, index: int, address: int, length: int, flags: int = 0, following: int = 0, at: int = DESC) -> None:
        self.write(at + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.write(AVAIL + 4 + 2 * (self.avail_idx % SIZE), struct.pack("<H", head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.write(AVAIL + 2, struct.pack("<H", self.avail_idx))

    def set_used_event(self, idx: int) -> None:
        self.write(AVAIL + 4 + 2 * SIZE, struct.pack("<H", idx & 0xFFFF))

    def avail_event(self) -> int:
        return self.u16(USED + 4 + 8 * SIZE)

    def take(self) -> Chain:
        return self.ring.peek(1)[0]

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def arena() -> Iterator[Arena]:
    it = Arena()
    yield it
    it.close()


def guest(offset: int) -> int:
    return GUEST_BASE + offset


def contents(chain: Chain) -> bytes:
    return b"".join(bytes(segment) for segment in chain.segments)


def test_single_descriptor_is_read(arena: Arena) -> None:
    arena.write(DATA, b"hello")
    arena.desc(3, guest(DATA), 5)
    assert not arena.ring.has_chain
    arena.offer(3)
    assert arena.ring.has_chain
    chain = arena.take()
    assert (chain.head, contents(chain)) == (3, b"hello")


def test_chain_is_read_in_its_order_and_empty_pieces_are_nothing(arena: Arena) -> None:
    arena.write(DATA, b"abcdef")
    arena.desc(7, guest(DATA), 2, NEXT, 0)
    arena.desc(0, guest(DATA + 4), 2, NEXT, 5)
    arena.desc(5, 2**64 - 1, 0, NEXT, 4)
    arena.desc(4, guest(DATA + 2), 2)
    arena.offer(7)
    assert contents(arena.take()) == b"abefcd"


@pytest.mark.parametrize("extra", [0, WRITE])
def test_indirect_table_is_read_also_behind_direct_descriptors(arena: Arena, extra: int) -> None:
    # A device must ignore WRITE in the descriptor that refers to a table (virtio 1.2, 2.7.5.3.2).
    arena.write(DATA, b"abcdef")
    arena.desc(0, guest(DATA + 4), 2, NEXT, 2, at=TABLE)
    arena.desc(2, guest(DATA), 1, 0, 0, at=TABLE)
    arena.desc(1, guest(DATA + 5), 1, NEXT, 6)
    arena.desc(6, guest(TABLE), 48, INDIRECT | extra)
    arena.offer(1)
    assert contents(arena.take()) == b"fefa"


def test_table_as_long_as_the_ring_is_fine_and_one_longer_is_not(arena: Arena) -> None:
    for count in (SIZE, SIZE + 1):
        for i in range(count):
            arena.desc(i, guest(DATA), 1, NEXT if i + 1 < count else 0, i + 1, at=TABLE)
        arena.desc(0, guest(TABLE), 16 * count, INDIRECT)
        arena.offer(0)
        if count == SIZE:
            assert len(arena.take().segments) == SIZE
            arena.ring.push_used(0)
        else:
            with pytest.raises(RingError, match="indirect table of"):
                arena.take()


def hostile_loop(a: Arena) -> None:
    a.desc(0, guest(DATA), 1, NEXT, 1)
    a.desc(1, guest(DATA), 1, NEXT, 0)


def hostile_self_loop(a: Arena) -> None:
    a.desc(0, guest(DATA), 1, NEXT, 0)


def hostile_next(a: Arena) -> None:
    a.desc(0, guest(DATA), 1, NEXT, SIZE)


def hostile_below(a: Arena) -> None:
    a.desc(0, GUEST_BASE - 1, 2)


def hostile_above(a: Arena) -> None:
    a.desc(0, guest(RAM - 1), 2)


def hostile_wrap(a: Arena) -> None:
    a.desc(0, 2**64 - 1, 0xFFFFFFFF)


def hostile_length(a: Arena) -> None:
    a.desc(0, guest(DATA), 0xFFFFFFFF)


def hostile_direction(a: Arena) -> None:
    a.desc(0, guest(DATA), 1, WRITE)


def hostile_late_direction(a: Arena) -> None:
    a.desc(0, guest(DATA), 1, NEXT, 1)
    a.desc(1, guest(DATA), 1, WRITE)


def hostile_table_and_next(a: Arena) -> None:
    a.desc(0, guest(TABLE), 16, INDIRECT | NEXT, 1)


def hostile_table_empty(a: Arena) -> None:
    a.desc(0, guest(TABLE), 0, INDIRECT)


def hostile_table_odd(a: Arena) -> None:
    a.desc(0, guest(TABLE), 24, INDIRECT)


def hostile_table_outside(a: Arena) -> None:
    a.desc(0, guest(RAM), 16, INDIRECT)


def hostile_table_in_table(a: Arena) -> None:
    a.desc(0, guest(TABLE), 16, INDIRECT)
    a.desc(0, guest(TABLE), 16, INDIRECT, at=TABLE)


def hostile_table_loop(a: Arena) -> None:
    a.desc(0, guest(TABLE), 32, INDIRECT)
    a.desc(0, guest(DATA), 1, NEXT, 1, at=TABLE)
    a.desc(1, guest(DATA), 1, NEXT, 0, at=TABLE)


def hostile_table_next(a: Arena) -> None:
    a.desc(0, guest(TABLE), 32, INDIRECT)
    a.desc(0, guest(DATA), 1, NEXT, 2, at=TABLE)


def hostile_long_chain_with_table(a: Arena) -> None:
    for i in range(SIZE - 1):
        a.desc(i, guest(DATA), 1, NEXT, i + 1)
    a.desc(SIZE - 1, guest(TABLE), 16 * SIZE, INDIRECT)
    for i in range(SIZE):
        a.desc(i, guest(DATA), 1, NEXT if i + 1 < SIZE else 0, i + 1, at=TABLE)


HOSTILE = [value for name, value in sorted(globals().items()) if name.startswith("hostile_")]


@pytest.mark.parametrize("prepare", HOSTILE)
def test_hostile_chain_breaks_the_ring(arena: Arena, prepare: Callable[[Arena], None]) -> None:
    prepare(arena)
    arena.offer(0)
    with pytest.raises(RingError):
        arena.take()


def test_indirect_that_was_not_agreed_on_breaks_the_ring() -> None:
    arena = Arena(has_indirect=False)
    arena.desc(0, guest(DATA), 1, 0, 0, at=TABLE)
    arena.desc(0, guest(TABLE), 16, INDIRECT)
    arena.offer(0)
    with pytest.raises(RingError, match="none were agreed on"):
        arena.take()
    arena.close()


def test_head_beyond_the_table_breaks_the_ring(arena: Arena) -> None:
    arena.offer(SIZE)
    with pytest.raises(RingError, match=f"descriptor {SIZE}"):
        arena.take()


@pytest.mark.parametrize("jump", [SIZE + 1, 1000, 0xFFFF])
def test_index_that_jumps_breaks_the_ring(arena: Arena, jump: int) -> None:
    arena.write(AVAIL + 2, struct.pack("<H", jump))
    with pytest.raises(RingError, match="jumped"):
        arena.ring.available()


def test_full_ring_is_no_jump(arena: Arena) -> None:
    for i in range(SIZE):
        arena.desc(i, guest(DATA), 1)
    arena.offer(*range(SIZE))
    assert len(arena.ring.peek(100)) == SIZE


def test_used_chains_come_back_in_order_and_only_when_published(arena: Arena) -> None:
    for i in range(SIZE):
        arena.desc(i, guest(DATA), 1)
    arena.offer(5, 2, 6)
    arena.ring.peek(3)
    arena.ring.push_used(10)
    arena.ring.push_used(20)
    assert arena.u16(USED + 2) == 0
    assert arena.ring.base == 2
    arena.ring.publish()
    assert arena.u16(USED + 2) == 2
    assert struct.unpack_from("<IIII", arena.ram, USED + 4) == (5, 10, 2, 20)
    assert not arena.ring.publish()


def test_ring_goes_around_and_resumes_where_it_stopped(arena: Arena) -> None:
    for i in range(SIZE):
        arena.desc(i, guest(DATA), 1)
    for i in range(70_000):
        arena.offer(i % SIZE)
        assert arena.take().head == i % SIZE
        arena.ring.push_used(i)
        arena.ring.publish()
    assert arena.ring.used_idx == 70_000 % 65536
    arena.offer(1, 2)
    arena.ring.peek(2)
    base = arena.ring.base
    assert base == 70_000 % 65536
    assert arena.restart(base).used_idx == base
    assert [chain.head for chain in arena.ring.peek(2)] == [1, 2]


@pytest.mark.parametrize(
    ("used_event", "is_due"),
    [(0, True), (1, True), (2, True), (3, False), (0xFFFF, False), (100, False)],
)
def test_event_index_decides_about_the_interrupt(arena: Arena, used_event: int, is_due: bool) -> None:
    arena.desc(0, guest(DATA), 1)
    arena.set_used_event(used_event)
    for _ in range(3):
        arena.offer(0)
    arena.ring.peek(3)
    for _ in range(3):
        arena.ring.push_used(0)
    assert arena.ring.publish() is is_due


def test_interrupt_asked_for_too_late_is_found_by_the_second_look(arena: Arena) -> None:
    arena.desc(0, guest(DATA), 1)
    arena.set_used_event(7)
    arena.offer(0)
    arena.take()
    arena.ring.push_used(0)
    assert not arena.ring.publish()
    arena.set_used_event(0)
    assert arena.ring.is_interrupt_due()
    assert not arena.ring.is_interrupt_due()


def test_long_silence_does_not_blind_the_second_look(arena: Arena) -> None:
    arena.desc(0, guest(DATA), 1)
    for i in range(66_000):
        arena.set_used_event(arena.ring.used_idx + 5)
        arena.offer(0)
        arena.take()
        arena.ring.push_used(0)
        assert not arena.ring.publish(), i
    arena.set_used_event(arena.ring.used_idx - 1)
    assert arena.ring.is_interrupt_due()


def test_flags_decide_without_event_index() -> None:
    arena = Arena(has_event_idx=False)
    arena.desc(0, guest(DATA), 1)
    for flags, is_due in ((1, False), (0, True)):
        arena.write(AVAIL, struct.pack("<H", flags))
        arena.offer(0)
        arena.take()
        arena.ring.push_used(0)
        assert arena.ring.publish() is is_due
    arena.ring.decline_kicks()
    assert arena.u16(USED) == 1
    assert not arena.ring.request_kick()
    assert arena.u16(USED) == 0
    arena.offer(0)
    assert arena.ring.request_kick()
    arena.close()


def test_kick_is_requested_for_the_next_chain_and_what_is_there_is_told(arena: Arena) -> None:
    arena.desc(0, guest(DATA), 1)
    arena.offer(0, 0)
    arena.ring.peek(1)
    assert arena.ring.request_kick()
    arena.ring.peek(2)
    assert not arena.ring.request_kick()
    assert arena.avail_event() == 2
    arena.ring.decline_kicks()
    assert arena.u16(USED) == 0


@pytest.mark.parametrize(
    ("size", "addresses"),
    [
        (0, (DESC, AVAIL, USED)),
        (3, (DESC, AVAIL, USED)),
        (2048, (DESC, AVAIL, USED)),
        (SIZE, (DESC + 8, AVAIL, USED)),
        (SIZE, (DESC, AVAIL + 1, USED)),
        (SIZE, (DESC, AVAIL, USED + 2)),
        (SIZE, (RAM, AVAIL, USED)),
        (SIZE, (RAM - 16, AVAIL, USED)),
        (SIZE, (DESC, RAM - 4, USED)),
        (SIZE, (DESC, AVAIL, RAM - 8)),
        (SIZE, (-(2**46), AVAIL, USED)),
    ],
)
def test_ring_that_cannot_be_is_refused(arena: Arena, size: int, addresses: tuple[int, int, int]) -> None:
    descriptors, available, used = addresses
    places = (FRONT_BASE + descriptors, FRONT_BASE + available, FRONT_BASE + used)
    with pytest.raises(RingError):
        RingLayout(arena.memory, size, places, has_event_idx=True, has_indirect=True)


@settings(deadline=None)
@given(st.binary(min_size=16 * SIZE, max_size=16 * SIZE), st.binary(max_size=256), st.lists(st.integers(0, SIZE)))
def test_any_descriptors_give_chains_within_ram_or_an_error(table: bytes, indirect: bytes, heads: list[int]) -> None:
    arena = Arena()
    try:
        arena.write(DESC, table)
        arena.write(TABLE, indirect)
        # Random addresses hardly ever hit: let every other one point at the table.
        for i in range(0, SIZE, 2):
            arena.write(DESC + 16 * i, struct.pack("<Q", guest(TABLE + 16 * i)))
        arena.offer(*heads[:SIZE])
        for _ in heads[:SIZE]:
            chain = arena.take()
            assert len(chain.segments) <= SIZE
            assert all(0 < len(segment) <= RAM for segment in chain.segments)
            arena.ring.push_used(0)
    except RingError:
        pass
    finally:
        arena.close()


def test_chains_in_splinters_are_not_read_ahead_without_bound(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmkit.vsock.vring.MAX_SEGMENTS_AHEAD", 10)
    for i in range(6):
        arena.desc(i, guest(DATA + i), 1, at=TABLE, flags=NEXT if i < 5 else 0, following=i + 1)
    arena.desc(0, guest(TABLE), 6 * 16, INDIRECT)
    arena.offer(0, 0, 0, 0)
    ring = arena.ring
    assert [len(chain.segments) for chain in ring.peek(4)] == [6, 6]
    ring.push_used(0)
    assert ring.has_chain and ring.base == 1
    for waiting in ([6, 6], [6, 6], [6]):
        assert [len(chain.segments) for chain in ring.peek(4)] == waiting
        ring.push_used(0)
    assert not ring.has_chain


# Memory.


@pytest.fixture
def two_regions() -> Iterator[MappedMemory]:
    fd = os.memfd_create("two")
    os.ftruncate(fd, 0x3000)
    low, high = RegionSpec(0, 0x1000, 0x10000, 0), RegionSpec(0x100000, 0x1000, 0x50000, 0x2000)
    yield map_memory([low, high], [fd, fd])
    os.close(fd)


def test_both_kinds_of_addresses_lead_to_the_same_bytes(two_regions: MappedMemory) -> None:
    two_regions.find(0x100010, 4)[:] = b"high"
    two_regions.find(0x10, 3)[:] = b"low"
    assert bytes(two_regions.find_front(0x50010, 4)) == b"high"
    assert bytes(two_regions.find_front(0x10010, 3)) == b"low"
    assert bytes(two_regions.find(0x100010, 4)) == b"high"


@pytest.mark.parametrize(
    ("address", "size"), [(0x1000, 1), (0xFFF, 2), (0xFFFFF, 1), (0x100FFF, 2), (0x101000, 0), (-1, 1), (2**64, 1)]
)
def test_addresses_outside_ram_are_refused(two_regions: MappedMemory, address: int, size: int) -> None:
    two_regions.find(0, 1)
    with pytest.raises(MemoryFaultError, match="no RAM"):
        two_regions.find(address, size)


def test_regions_that_cannot_be_are_refused() -> None:
    fd = os.memfd_create("bad")
    os.ftruncate(fd, 0x2000)
    good = RegionSpec(0, 0x1000, 0, 0)
    for specs in (
        [],
        [good] * 9,
        [good._replace(size_bytes=0)],
        [good._replace(size_bytes=0x2001)],
        [good._replace(mmap_offset=0x1001)],
        [good._replace(guest_address=2**64 - 1)],
        [good, good._replace(guest_address=0xFFF)],
    ):
        with pytest.raises(MemoryFaultError):
            map_memory(specs, [fd] * len(specs))
    with pytest.raises(MemoryFaultError):
        map_memory([good], [])
    reader, writer = os.pipe()
    with pytest.raises(MemoryFaultError, match="cannot map"):
        map_memory([good], [reader])
    for each in (fd, reader, writer):
        os.close(each)
