"""A dump becomes a file with holes and a ceiling, in pieces of any size, whatever QEMU writes."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmkit.crashes.dump import MAX_PLACE_BYTES, PAGE_BYTES, SparseFile, open_dump
from vmkit.crashes.record import DumpFormat
from vmkit.errors import MachineError

MIB = 1 << 20
PIECES = (1, 7, 4096, 65537, 1 << 20)


@pytest.fixture
def dump_file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "dump", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def flatten(pieces: list[tuple[int, bytes]]) -> bytes:
    """As QEMU writes a kdump to what cannot seek (dump/dump.c)."""
    header = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(4096, b"\0")
    body = b"".join(struct.pack(">qq", at, len(data)) + data for at, data in pieces)
    return header + body + struct.pack(">qq", -1, -1)


def feed(fd: int, format_: DumpFormat, data: bytes, piece_bytes: int, max_bytes: int = 64 * MIB) -> int:
    file = SparseFile(fd, max_bytes)
    dump = open_dump(format_, file)
    for at in range(0, len(data), piece_bytes):
        dump.feed(data[at : at + piece_bytes])
    dump.finish()
    return file.size_bytes


@pytest.mark.parametrize("piece_bytes", PIECES[1:])
def test_elf_is_the_same_file_with_holes(dump_file: int, piece_bytes: int) -> None:
    # It begins and ends within pages, has a run over several, and ends in a hole.
    head, middle = os.urandom(1000), os.urandom(3 * PAGE_BYTES + 5)
    data = head.ljust(40 * PAGE_BYTES, b"\0") + middle + bytes(2 * MIB)
    assert feed(dump_file, DumpFormat.ELF, data, piece_bytes) == len(data)
    assert os.pread(dump_file, len(data) + 1, 0) == data
    # Pieces that are no whole pages cost a page at each end.
    if piece_bytes >= MIB:
        assert os.fstat(dump_file).st_blocks * 512 <= 8 * PAGE_BYTES


@pytest.mark.parametrize("piece_bytes", PIECES)
def test_flattened_kdump_becomes_the_file_that_it_describes(dump_file: int, piece_bytes: int) -> None:
    pieces = [(0, b"KDUMP   " + os.urandom(500)), (9000, os.urandom(5000)), (508, b"written later"), (20000, b"")]
    assert feed(dump_file, DumpFormat.KDUMP, flatten(pieces), piece_bytes) == 14000 or pieces[3][0] == 20000
    wanted = bytearray(14000)
    for at, data in pieces[:3]:
        wanted[at : at + len(data)] = data
    assert os.pread(dump_file, 14000, 0) == bytes(wanted)


def test_dump_over_the_ceiling_is_refused_and_zeros_cost_nothing(dump_file: int) -> None:
    feed(dump_file, DumpFormat.ELF, bytes(8 * MIB), MIB, max_bytes=1000)
    with pytest.raises(MachineError, match="the dump is larger than 1 MiB"):
        feed(dump_file, DumpFormat.ELF, b"x" * (2 * MIB), MIB, max_bytes=MIB)
    assert os.fstat(dump_file).st_blocks * 512 <= MIB


@pytest.mark.parametrize(
    ("data", "brief"),
    [
        (b"\x7fELF".ljust(5000, b"\0"), "no kdump in makedumpfile's form"),
        (flatten([])[:-16] + struct.pack(">qq", 0, -5), "a piece of -5 bytes"),
        (flatten([])[:-16] + struct.pack(">qq", -9, 5) + b"12345", "a piece at -0x9"),
        (flatten([])[:-16] + struct.pack(">qq", MAX_PLACE_BYTES + 1, 5) + b"12345", "a piece at 0x"),
        (flatten([(0, b"12345")])[:-16], "ends before its end mark"),
        (b"", "ends before its end mark"),
    ],
    ids=["ELF", "a negative size", "a negative place", "a place far away", "no end", "nothing"],
)
def test_dump_that_lies_is_named(dump_file: int, data: bytes, brief: str) -> None:
    with pytest.raises(MachineError, match=brief):
        feed(dump_file, DumpFormat.KDUMP, data, 4096)
    assert os.fstat(dump_file).st_blocks * 512 <= MIB


def test_what_stands_behind_the_end_of_a_kdump_is_nothing(dump_file: int) -> None:
    data = flatten([(0, b"KDUMP")]) + os.urandom(100_000)
    assert feed(dump_file, DumpFormat.KDUMP, data, 5000) == 5
