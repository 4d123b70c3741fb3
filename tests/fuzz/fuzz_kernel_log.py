"""Fuzzes the reading of a kernel's log: any memory gives records or a MachineError, after a bounded number of reads.

Longer than under pytest: python -m tests.fuzz.fuzz_kernel_log --cases 1000000 --seed 1
"""

import random
import struct

from tests.fuzz.seeded import run_program
from tests.vmkit.memory.kernel_maker import (
    BANNER_TEXT,
    DESCRIPTORS,
    INFOS,
    NOTE,
    PHYS_BASE,
    POINTER,
    TEXT,
    KernelMaker,
)
from vmkit.errors import MachineError
from vmkit.memory.guest import MAX_READS, MemoryFile
from vmkit.memory.kernel_log import read_kernel_log
from vmkit.memory.lines import MAX_LOG_BYTES, parse_lines, render_records
from vmkit.memory.ring import MAX_RECORDS, MAX_TEXT_BYTES

# What is damaged: the note, the page tables, the ring's description, its tables, its text.
AREAS = (
    *((NOTE, 1024), (PHYS_BASE + 0x1000, 0x7000), (PHYS_BASE + POINTER, 0x180), (PHYS_BASE + DESCRIPTORS, 16 * 24)),
    *((PHYS_BASE + INFOS, 16 * 88), (PHYS_BASE + TEXT, 1024)),
)
WORDS = (0, 1, 0x1000, 0x7FFF_FFFF, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, PHYS_BASE | 1, PHYS_BASE | 0x81)
# A guest writes while it is read: one read in so many is damaged.
LIVE_ODDS = 50


class LiveMemory:
    """A memory that changes at times, and counts its reads."""

    def __init__(self, memory: MemoryFile, rng: random.Random) -> None:
        self._memory = memory
        self._rng = rng
        self._is_live = rng.random() < 0.3
        self.reads = 0
        self.search = memory.search
        self.search_pages = memory.search_pages

    def read(self, address: int, size: int) -> bytes:
        self.reads += 1
        data = self._memory.read(address, size)
        if self._is_live and self._rng.randrange(LIVE_ODDS) == 0:
            return self._rng.randbytes(size)
        return data


def make_case(rng: random.Random) -> KernelMaker:
    """A good kernel's memory with some damage."""
    kernel = KernelMaker(
        head_words=rng.choice((5, 6)),
        is_dynamic=rng.random() < 0.3,
        levels=rng.choice((4, 5)),
        has_note=rng.random() < 0.8,
    )
    kernel.log(BANNER_TEXT)
    for _ in range(rng.randrange(30)):
        kernel.log(rng.randbytes(rng.randrange(100)), rng.randrange(8), rng.randrange(256), rng.getrandbits(64))
    for _ in range(rng.randrange(6)):
        start, size = rng.choice(AREAS)
        at = start + rng.randrange(size)
        if rng.random() < 0.5:
            kernel.memory[at] = rng.randrange(256)
        else:
            kernel.put(at & ~7, struct.pack("<Q", rng.choice((*WORDS, rng.getrandbits(64)))))
    return kernel


def run_seeded(rng: random.Random) -> bool:
    """One case; whether it gave records. Raises whatever a case may not."""
    return run_case(make_case(rng), rng)


def run_case(kernel: KernelMaker, rng: random.Random) -> bool:
    with kernel.open() as file:
        memory = LiveMemory(file, rng)
        try:
            records = read_kernel_log(memory)
        except MachineError:
            return False
        finally:
            assert memory.reads <= MAX_READS + 1
    assert 0 < len(records) <= MAX_RECORDS
    assert sum(len(record.text) for record in records) <= MAX_TEXT_BYTES
    log = render_records(records)
    assert len(log) <= MAX_LOG_BYTES
    assert len(list(parse_lines(log))) == log.count(b"\n")
    return True


if __name__ == "__main__":
    run_program(__doc__, "kernel log", "with records", run_seeded)
