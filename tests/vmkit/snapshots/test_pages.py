"""The pages of a memory in a file: what is written, that the same comes back, and that damage is found."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.snapshots.pages import PAGE_BYTES, RUN_BYTES, DamagedError, Run, check_runs, load_pages, save_pages

MEMORY_BYTES = 3 * RUN_BYTES


def make_memory(pages: dict[int, bytes], size: int = MEMORY_BYTES) -> int:
    """A memory with these bytes at the beginning of these pages."""
    fd = os.memfd_create("memory")
    os.ftruncate(fd, size)
    for page, data in pages.items():
        os.pwrite(fd, data, page * PAGE_BYTES)
    return fd


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@given(st.dictionaries(st.integers(0, MEMORY_BYTES // PAGE_BYTES - 1), st.binary(min_size=1, max_size=9), max_size=40))
def test_memory_comes_back_as_it_was(pages: dict[int, bytes]) -> None:
    memory, file, empty = make_memory(pages), os.memfd_create("file"), make_memory({})
    try:
        runs = save_pages(memory, MEMORY_BYTES, file)
        check_runs(runs, MEMORY_BYTES, os.fstat(file).st_size)
        load_pages(file, runs, empty)
        assert read_all(empty) == read_all(memory)
        used = {page for page, data in pages.items() if data.strip(b"\0")}
        assert os.fstat(file).st_size == PAGE_BYTES * len(used)
    finally:
        for fd in (memory, file, empty):
            os.close(fd)


def test_zero_pages_are_not_written_and_stay_holes(tmp_path: Path) -> None:
    memory = make_memory({0: b"a", 1: b"b", 300: b"c"})
    with (tmp_path / "file").open("w+b") as file:
        runs = save_pages(memory, MEMORY_BYTES, file.fileno())
        assert [(run.address, run.size) for run in runs] == [(0, 2 * PAGE_BYTES), (300 * PAGE_BYTES, PAGE_BYTES)]
        assert file.seek(0, os.SEEK_END) == 3 * PAGE_BYTES
        target = make_memory({})
        load_pages(file.fileno(), runs, target)
        assert os.fstat(target).st_blocks * 512 == 3 * PAGE_BYTES
    os.close(memory)
    os.close(target)


@pytest.mark.parametrize("at", [0, PAGE_BYTES - 1, PAGE_BYTES, 3 * PAGE_BYTES - 1])
def test_one_wrong_bit_is_found_before_the_guest_has_it(tmp_path: Path, at: int) -> None:
    memory = make_memory({0: b"a", 1: b"b", 300: b"c"})
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        runs = save_pages(memory, MEMORY_BYTES, file.fileno())
        (byte,) = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte ^ 4]), at)
        target = make_memory({})
        with pytest.raises(DamagedError, match="its memory differs"):
            load_pages(file.fileno(), runs, target)
        assert os.pread(target, 1, runs[0].address if at < 2 * PAGE_BYTES else runs[1].address) == b"\0"
    os.close(memory)
    os.close(target)


def test_short_file_is_found(tmp_path: Path) -> None:
    memory = make_memory({0: b"a"})
    with (tmp_path / "file").open("w+b", buffering=0) as file:
        runs = save_pages(memory, MEMORY_BYTES, file.fileno())
        file.truncate(PAGE_BYTES - 1)
        with pytest.raises(DamagedError):
            load_pages(file.fileno(), runs, memory)
    os.close(memory)


GOOD = (Run(0, PAGE_BYTES, 1), Run(2 * PAGE_BYTES, 2 * PAGE_BYTES, 2))


@pytest.mark.parametrize(
    "runs",
    [
        (replace(GOOD[0], size=0), GOOD[1]),
        (replace(GOOD[0], size=100), GOOD[1]),
        (replace(GOOD[0], address=100), GOOD[1]),
        (replace(GOOD[0], address=-PAGE_BYTES), GOOD[1]),
        (GOOD[0], replace(GOOD[1], size=2 * RUN_BYTES)),
        (GOOD[0], replace(GOOD[1], address=MEMORY_BYTES - PAGE_BYTES)),
        (GOOD[1], GOOD[0]),
        (GOOD[0], GOOD[0], PAGE_BYTES and replace(GOOD[1], size=PAGE_BYTES)),
        (GOOD[0],),
        (),
    ],
)
def test_list_of_pages_that_is_none_is_refused(runs: tuple[Run, ...]) -> None:
    check_runs(GOOD, MEMORY_BYTES, 3 * PAGE_BYTES)
    with pytest.raises(DamagedError):
        check_runs(runs, MEMORY_BYTES, 3 * PAGE_BYTES)
