"""The kernel's log out of a memory that is made by hand: whole, wrapped, elsewhere, early, damaged, hostile."""

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmkit.memory.kernel_maker import (
    BANNER,
    BANNER_TEXT,
    COMMITTED,
    DESCRIPTORS,
    FINALIZED,
    IMAGE,
    INFOS,
    NOTE,
    PHYS_BASE,
    POINTER,
    RELEASE,
    RING,
    TEXT,
    KernelMaker,
    open_memory,
)
from vmkit.errors import MachineError
from vmkit.memory.guest import MAX_READS, MemoryFile
from vmkit.memory.kernel_log import read_kernel_log
from vmkit.memory.ring import PrintkRecord

RESERVED = 0
KINDS: list[dict[str, object]] = [{}, {"head_words": 5}, {"is_dynamic": True}, {"levels": 5}]
EARLY: list[dict[str, object]] = [{"has_note": False}, {"has_note": False, "head_words": 5}]


def make(**options: Any) -> KernelMaker:
    return KernelMaker(**options)


def read(kernel: KernelMaker) -> list[PrintkRecord]:
    with kernel.open() as memory:
        return read_kernel_log(memory)


def list_written(kernel: KernelMaker) -> list[PrintkRecord]:
    return [PrintkRecord(one.level, one.facility, one.time_ns, one.text) for one in kernel.valid]


def boot(kernel: KernelMaker) -> KernelMaker:
    kernel.log(BANNER_TEXT, level=5)
    kernel.log(b"two\nlines \xff\x1b[31m", level=3, facility=1, time_ns=12_345_678_901)
    kernel.log(b"")
    return kernel


@pytest.mark.parametrize("options", KINDS + EARLY)
def test_log_is_what_was_printed(options: dict[str, object]) -> None:
    kernel = boot(make(**options))
    assert len(kernel.valid) == 3
    assert read(kernel) == list_written(kernel)


@pytest.mark.parametrize("options", KINDS)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_ring_that_wraps_keeps_the_newest(options: dict[str, object], texts: list[bytes]) -> None:
    kernel = make(**options)
    for number, text in enumerate(texts):
        kernel.log(text, level=number % 8, time_ns=number)
    assert read(kernel) == list_written(kernel)
    assert kernel.valid[-1].text == texts[-1]


def test_record_that_is_being_written_is_left_out() -> None:
    kernel = boot(make())
    kernel.log(b"half", state=RESERVED)
    assert [record.text for record in read(kernel)] == [one.text for one in kernel.valid]
    kernel.log(b"no newline yet", state=COMMITTED)
    assert read(kernel)[-1].text == b"no newline yet"


class Changing:
    """A memory whose guest goes on when a text has been read: the record's descriptor is another's then."""

    def __init__(self, memory: MemoryFile, at: int) -> None:
        self._memory = memory
        self._at = at
        self._is_changed = False
        self.search = memory.search
        self.search_pages = memory.search_pages

    def read(self, address: int, size: int) -> bytes:
        data = self._memory.read(address, size)
        if address == PHYS_BASE + TEXT:
            self._is_changed = True
        if self._is_changed and address == self._at:
            (state,) = struct.unpack("<Q", data[:8])
            data = struct.pack("<Q", state + 16) + data[8:]
        return data


def test_record_that_the_guest_overwrites_meanwhile_is_left_out() -> None:
    kernel = boot(make())
    with kernel.open() as memory:
        first = kernel.valid[0]
        found = read_kernel_log(Changing(memory, PHYS_BASE + DESCRIPTORS + first.number % 16 * 24))
    assert found == list_written(kernel)[1:]


def test_block_that_is_another_records_is_left_out() -> None:
    kernel = boot(make())
    kernel.put_word(PHYS_BASE + TEXT, 1)
    assert read(kernel) == list_written(kernel)[1:]


def test_forged_note_does_not_hide_the_kernels() -> None:
    """A program has notes in its memory: one of another kernel, one that leads nowhere."""
    kernel = boot(make())
    note = bytes(kernel.memory[NOTE : NOTE + 4096])
    kernel.put(0x1000, note.replace(b"SYMBOL(prb)", b"SYMBOL(log_buf)"))
    kernel.put(0x2000, note.replace(b"SYMBOL(prb)=ffffffff8000", b"SYMBOL(prb)=ffffffff9000"))
    assert read(kernel) == list_written(kernel)


def test_older_kernel_is_refused_by_name() -> None:
    kernel = make()
    note = bytes(kernel.memory[NOTE : NOTE + 4096]).replace(b"prb", b"bpr")
    kernel.put(NOTE, note)
    with pytest.raises(MachineError) as caught:
        read(kernel)
    assert caught.value.brief.startswith(f"the guest's kernel {RELEASE} has no log that vmkit can read: ")
    assert "5.10 and later" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"\xff" * 8192, b"Linux version " * 1000])
def test_memory_without_a_kernel_is_refused(data: bytes) -> None:
    with open_memory(data, size_bytes=1 << 20) as memory, pytest.raises(MachineError, match="holds no Linux kernel"):
        read_kernel_log(memory)


def test_kernel_before_its_first_line_is_named() -> None:
    with pytest.raises(MachineError, match=RELEASE):
        read(make(has_note=False))


def make_hostile() -> KernelMaker:
    """A large ring of records that all look good and are as long as can be, with one text that is no one's."""
    # The infos of the newest 13,000 fit into what the image has behind the descriptors.
    count_bits, descriptors, infos, newest = 16, 0x4_0000, 0x1C_0000, (1 << 16) - 13_000
    kernel = make()
    kernel.put(NOTE, bytes(kernel.memory[NOTE : NOTE + 4096]).replace(b"SIZE(printk_info)=88", b"SIZE(printk_info)=20"))
    head = (1 << count_bits) * 5 - 1
    words = (
        count_bits,
        IMAGE + descriptors,
        IMAGE + infos - newest * 20,
        head,
        head + 1 - (1 << count_bits),
        0,
        31,
        IMAGE,
    )
    kernel.put(PHYS_BASE + RING, struct.pack("<8Q", *words))
    first = head + 1 - (1 << count_bits)
    states = b"".join(struct.pack("<QQQ", FINALIZED << 62 | first + n, 0, 1 << 17) for n in range(1 << count_bits))
    kernel.put(PHYS_BASE + descriptors, states)
    kernel.put(PHYS_BASE + infos, struct.pack("<QQHBB", 0, 0, 65535, 0, 0) * 13_000)
    return kernel


def test_reading_of_a_hostile_ring_ends() -> None:
    kernel = make_hostile()
    with kernel.open() as memory:
        counted = Counted(memory)
        with pytest.raises(MachineError):
            read_kernel_log(counted)
    assert 10_000 < counted.reads <= MAX_READS


def test_many_hostile_rings_are_given_up() -> None:
    kernel = make_hostile()
    note = bytes(kernel.memory[NOTE : NOTE + 4096])
    for number in range(1, 4):
        kernel.put(NOTE + number * 4096, note)
    with kernel.open() as memory, pytest.raises(MachineError, match="made to keep its reader busy"):
        read_kernel_log(memory)


class Counted:
    """A memory that counts."""

    def __init__(self, memory: MemoryFile) -> None:
        self._memory = memory
        self.reads = 0
        self.search = memory.search
        self.search_pages = memory.search_pages

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        return self._memory.read(address, size)


AREAS = [
    (NOTE, 2048), (PHYS_BASE + 0x1000, 0x7000), (PHYS_BASE + POINTER, 0x180), (PHYS_BASE + DESCRIPTORS, 16 * 24),
    (PHYS_BASE + INFOS, 16 * 88), (PHYS_BASE + TEXT, 1024), (PHYS_BASE + BANNER, 64),
]  # fmt: skip
WORDS = [0, 1, 0xFF, 0x1000, 0x7FFF_FFFF, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, PHYS_BASE | 1]
damages = st.lists(
    st.tuples(st.sampled_from(AREAS), st.integers(0, 0x7000), st.sampled_from(WORDS) | st.integers(0, (1 << 64) - 1)),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("options", KINDS + EARLY)
@given(damages)
@settings(max_examples=60, deadline=None)
def test_damaged_memory_gives_records_or_an_error(
    options: dict[str, object], damage: list[tuple[tuple[int, int], int, int]]
) -> None:
    kernel = boot(make(**options))
    for (start, size), offset, word in damage:
        kernel.put(start + offset % size, struct.pack("<Q", word))
    with contextlib.suppress(MachineError):
        assert read(kernel)
