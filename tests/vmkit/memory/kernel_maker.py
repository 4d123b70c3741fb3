"""A kernel's memory made by hand: page tables, a VMCOREINFO note, and a ring that is written as printk writes it.

Written after kernel/printk/printk_ringbuffer.c, and not after our reader: record numbers, wraps, and what a new record
makes of the old ones.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vmkit.memory.guest import MemoryFile

PAGE = 4096
MEMORY_BYTES = 6 << 20
IMAGE = 0xFFFF_FFFF_8000_0000
DIRECT_MAP = 0xFFFF_8880_0000_0000
PHYS_BASE = 0x20_0000
# Offsets in the image.
TOP, UPPER, MIDDLE, LOWER, HIGHEST = 0x1000, 0x2000, 0x3000, 0x4000, 0x7000
DIRECT_UPPER, DIRECT_MIDDLE, DIRECT_LOWER = 0x5000, 0x6000, 0x4000
POINTER, RING, DESCRIPTORS, INFOS, TEXT, BANNER = 0x8000, 0x8100, 0x9000, 0xA000, 0x1_0000, 0x2_0080
NOTE = 0x50_0000
# A ring elsewhere lies in pages of 4 KiB whose physical order is the reverse.
SCATTERED, SCATTERED_PAGES = 0x40_0000, 64
RELEASE = "6.12.0-made"
BANNER_TEXT = f"Linux version {RELEASE} (made by hand)".encode()
COMMITTED, FINALIZED, REUSABLE = 1, 2, 3
WORD = (1 << 64) - 1


@dataclass
class Written:
    """A record as it was given, and where its block is."""

    number: int
    level: int
    facility: int
    time_ns: int
    text: bytes
    begin: int
    end: int


@dataclass
class KernelMaker:
    """count_bits, size_bits: the ring's size. head_words: 6 in the description of records, as 6.12 has it, or 5.

    is_dynamic: the ring is where log_buf_len= puts it, and not in the image. levels: of the page tables.
    """

    count_bits: int = 4
    size_bits: int = 10
    head_words: int = 6
    is_dynamic: bool = False
    levels: int = 4
    has_note: bool = True
    memory: bytearray = field(default_factory=lambda: bytearray(MEMORY_BYTES))
    valid: list[Written] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.number = (1 << 32) - (1 << self.count_bits) - 1
        self.lpos = -(1 << self.size_bits) & WORD
        self.base = DIRECT_MAP + SCATTERED if self.is_dynamic else IMAGE
        self.first_number = self.number
        self._write_tables()
        if self.has_note:
            self._write_note()
        self._write_description()
        self.put(PHYS_BASE + BANNER, BANNER_TEXT)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def put(self, address: int, data: bytes) -> None:
        self.memory[address : address + len(data)] = data

    def put_word(self, address: int, value: int) -> None:
        self.put(address, struct.pack("<Q", value & WORD))

    def place(self, offset: int) -> int:
        """The physical address of an offset in the ring's own memory."""
        if not self.is_dynamic:
            return PHYS_BASE + offset
        page, inner = divmod(offset, PAGE)
        return SCATTERED + (SCATTERED_PAGES - 1 - page) * PAGE + inner

    def put_ring(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data):
            self.memory[self.place(offset + at)] = byte

    def _write_tables(self) -> None:
        def entry(table: int, index: int, address: int, flags: int = 1) -> None:
            self.put_word(PHYS_BASE + table + index * 8, address | flags)

        entry(TOP, 511, PHYS_BASE + UPPER)
        entry(UPPER, 510, PHYS_BASE + MIDDLE)
        entry(MIDDLE, 0, PHYS_BASE, 0x81)
        entry(TOP, 273, PHYS_BASE + DIRECT_UPPER)
        entry(DIRECT_UPPER, 0, PHYS_BASE + DIRECT_MIDDLE)
        entry(DIRECT_MIDDLE, SCATTERED >> 21, PHYS_BASE + DIRECT_LOWER)
        for page in range(SCATTERED_PAGES):
            # The upper bit is no-execute.
            entry(DIRECT_LOWER, page, SCATTERED + (SCATTERED_PAGES - 1 - page) * PAGE, 1 << 63 | 3)
        entry(HIGHEST, 511, PHYS_BASE + TOP)

    def _write_note(self) -> None:
        records = self.head_words * 8
        lines = [
            f"OSRELEASE={RELEASE}",
            "BUILD-ID=00ff",
            "PAGESIZE=4096",
            f"SYMBOL(init_top_pgt)={IMAGE + (TOP if self.levels == 4 else HIGHEST):x}",
            f"SYMBOL(prb)={IMAGE + POINTER:x}",
            f"NUMBER(phys_base)={PHYS_BASE}",
            f"NUMBER(pgtable_l5_enabled)={int(self.levels == 5)}",
            "OFFSET(printk_ringbuffer.desc_ring)=0",
            f"OFFSET(printk_ringbuffer.text_data_ring)={records}",
            *(f"OFFSET(prb_desc_ring.{name})={at}" for name, at in zip(
                ("count_bits", "descs", "infos", "head_id", "tail_id"), range(0, 40, 8), strict=True)),
            "OFFSET(prb_data_ring.size_bits)=0",
            "OFFSET(prb_data_ring.data)=8",
            "SIZE(prb_desc)=24",
            "OFFSET(prb_desc.state_var)=0",
            "OFFSET(prb_desc.text_blk_lpos)=8",
            "OFFSET(prb_data_blk_lpos.begin)=0",
            "OFFSET(prb_data_blk_lpos.next)=8",
            "SIZE(printk_info)=88",
            "OFFSET(printk_info.ts_nsec)=8",
            "OFFSET(printk_info.text_len)=16",
            "OFFSET(atomic_long_t.counter)=0",
        ]  # fmt: skip
        text = "\n".join(lines).encode() + b"\n"
        self.put(NOTE, struct.pack("<III", 11, len(text), 0) + b"VMCOREINFO\0\0" + text)

    def _write_description(self) -> None:
        self.put_word(PHYS_BASE + POINTER, IMAGE + RING)
        words = [self.count_bits, self.base + DESCRIPTORS - self._origin, self.base + INFOS - self._origin]
        tail = self.valid[0].number if self.valid else self.number
        words += [self.number, tail, 0][: self.head_words - 3]
        words += [self.size_bits, self.base + TEXT - self._origin, self.lpos, 0]
        for at, word in enumerate(words):
            self.put_word(PHYS_BASE + RING + at * 8, word)

    @property
    def _origin(self) -> int:
        """A ring elsewhere begins with its descriptors."""
        return DESCRIPTORS if self.is_dynamic else 0

    # ---- printk ---------------------------------------------------------------------------------------------------

    def log(self, text: bytes, level: int = 6, facility: int = 0, time_ns: int = 0, state: int = FINALIZED) -> None:
        """One call of printk. The blocks and descriptors that it needs are taken from the oldest records."""
        size, count = 1 << self.size_bits, 1 << self.count_bits
        self.number += 1
        begin = self.lpos
        block_bytes = -(-(8 + len(text)) // 8) * 8
        assert block_bytes <= size
        end = begin + block_bytes & WORD
        is_wrapped = begin // size != end // size
        if is_wrapped:
            # get_next_lpos(): the whole block lies at the start.
            end = end - end % size + block_bytes & WORD
        index = 0 if is_wrapped else begin % size
        oldest = end - size & WORD
        while self.valid and (len(self.valid) >= count or self._is_before(self.valid[0].begin, oldest)):
            old = self.valid.pop(0)
            self._put_descriptor(old.number, REUSABLE, old.begin, old.end)
        self.lpos = end
        self.put_ring(TEXT - self._origin + index, struct.pack("<Q", self.number) + text)
        info = struct.pack("<QQHBBI64x", self.number, time_ns, len(text), facility, level << 5 | 6, 0)
        self.put_ring(INFOS - self._origin + self.number % count * 88, info)
        self._put_descriptor(self.number, state, begin, end)
        if state in (COMMITTED, FINALIZED):
            self.valid.append(Written(self.number, level, facility, time_ns, text, begin, end))
        self._write_description()

    def _put_descriptor(self, number: int, state: int, begin: int, end: int) -> None:
        at = DESCRIPTORS - self._origin + number % (1 << self.count_bits) * 24
        self.put_ring(at, struct.pack("<QQQ", state << 62 | number, begin, end))

    @staticmethod
    def _is_before(one: int, other: int) -> bool:
        return (other - one - 1 & WORD) < 1 << 63

    @contextmanager
    def open(self) -> Iterator[MemoryFile]:
        """The memory as a file, as QEMU has it."""
        with open_memory(bytes(self.memory)) as memory:
            yield memory


@contextmanager
def open_memory(data: bytes, at: int = 0, size_bytes: int | None = None) -> Iterator[MemoryFile]:
    """A file with some data at an offset, and holes."""
    fd = os.memfd_create("memory")
    try:
        total = size_bytes or at + len(data)
        os.ftruncate(fd, total)
        for start in range(0, len(data), PAGE):
            page = data[start : start + PAGE]
            if page != bytes(PAGE):
                os.pwrite(fd, page, at + start)
        yield MemoryFile(fd, total)
    finally:
        os.close(fd)
