"""The memory of a machine as a file: where its addresses are, holes, edges, searches across chunks."""

import os
import re

import pytest

from tests.vmkit.memory.kernel_maker import open_memory
from vmkit.memory.guest import (
    CHUNK_BYTES,
    GIB,
    HIGH_START,
    LOW_BYTES,
    MAX_READS,
    PAGE_BYTES,
    SPLIT_FROM_BYTES,
    LimitedMemory,
    SpentError,
    UnreadableError,
)


def test_memory_below_the_split_is_one_piece() -> None:
    with open_memory(b"there", SPLIT_FROM_BYTES - PAGE_BYTES - PAGE_BYTES, SPLIT_FROM_BYTES - PAGE_BYTES) as memory:
        assert memory.read(SPLIT_FROM_BYTES - 2 * PAGE_BYTES, 5) == b"there"
        assert list(memory.search(re.compile(b"there"), 5)) == [SPLIT_FROM_BYTES - 2 * PAGE_BYTES]
        with pytest.raises(UnreadableError):
            memory.read(HIGH_START, 1)


def test_memory_above_the_split_goes_on_at_4_gib() -> None:
    with open_memory(b"there", LOW_BYTES, 3 * GIB) as memory:
        assert memory.read(HIGH_START, 5) == b"there"
        assert memory.read(LOW_BYTES - 1, 1) == b"\0"
        assert list(memory.search_pages(b"there", 0)) == [HIGH_START]
        for address, size in ((LOW_BYTES, 1), (LOW_BYTES - 1, 2), (HIGH_START - 1, 2), (HIGH_START + GIB, 1)):
            with pytest.raises(UnreadableError):
                memory.read(address, size)


def test_text_does_not_reach_across_the_hole() -> None:
    with open_memory(bytes(PAGE_BYTES - 2) + b"there" + bytes(100), LOW_BYTES - PAGE_BYTES, 3 * GIB) as memory:
        assert memory.read(LOW_BYTES - 2, 2) + memory.read(HIGH_START, 3) == b"there"
        assert list(memory.search(re.compile(b"there"), 5)) == []


@pytest.mark.parametrize(("address", "size"), [(-1, 1), (-PAGE_BYTES, PAGE_BYTES), (0, -1), (1 << 64, 8), (4096, 1)])
def test_address_without_memory_is_refused(address: int, size: int) -> None:
    with open_memory(bytes(4096)) as memory, pytest.raises(UnreadableError):
        memory.read(address, size)


@pytest.mark.parametrize("before", range(6))
def test_text_across_two_chunks_is_found_once(before: int) -> None:
    at = CHUNK_BYTES - before
    with open_memory(b"\1" * at + b"there" + b"\1" * CHUNK_BYTES) as memory:
        assert list(memory.search(re.compile(b"there"), 5)) == [at]


def test_search_by_pages_finds_what_is_at_their_offset_alone() -> None:
    page = b"there".rjust(17, b"t").ljust(PAGE_BYTES, b"t")
    with open_memory(page * 80) as memory:
        assert list(memory.search_pages(b"there", 12)) == list(range(12, 80 * PAGE_BYTES, PAGE_BYTES))
        assert list(memory.search_pages(b"there", 11)) == []


def test_search_makes_no_page_of_a_hole() -> None:
    with open_memory(b"there", GIB, 2 * GIB) as memory:
        before = os.fstat(memory._fd).st_blocks
        assert list(memory.search(re.compile(b"there"), 5)) == [GIB]
        assert memory.read(0, 8) == bytes(8)
        assert os.fstat(memory._fd).st_blocks == before


def test_file_that_is_cut_ends_no_reader() -> None:
    with open_memory(b"x" * 8192) as memory:
        os.ftruncate(memory._fd, 4096)
        assert list(memory.search(re.compile(b"y"), 1)) == []
        with pytest.raises(UnreadableError):
            memory.read(4096, 1)


def test_reads_of_a_limited_memory_end() -> None:
    with open_memory(bytes(4096)) as memory:
        limited = LimitedMemory(memory)
        for _ in range(MAX_READS):
            limited.read(0, 1)
        with pytest.raises(SpentError):
            limited.read(0, 1)
