"""Tar streams that lie: every number has a range, and nothing is taken into memory on an archive's word."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from vsh.errors import VshError
from vsh.tarstream import BLOCK_BYTES, TEXT_BYTES_MAX, read_members

END = bytes(2 * BLOCK_BYTES)


def head(name: str = "copy", kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: object) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def head_with_size_field(field: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A head whose size is in binary, with its checksum."""
    block = bytearray(head(kind=kind))
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def extended(record: bytes) -> bytes:
    """A pax header of one record, which is counted here."""
    size = len(record) + 2
    while len(b"%d " % size) + len(record) + 1 != size:
        size = len(b"%d " % size) + len(record) + 1
    return extended_as_it_is(b"%d %s\n" % (size, record))


def extended_as_it_is(data: bytes) -> bytes:
    return head(kind=tarfile.XHDTYPE, size=len(data)) + data + bytes(-len(data) % BLOCK_BYTES)


BROKEN = {
    "no-tar": b"no tar at all" * 100,
    "empty": b"",
    "no-end": head(),
    "cut-in-the-data": head(size=5000) + bytes(700),
    "negative-size": head_with_size_field(b"\xff" * 12) + END,
    "size-beyond-all": head_with_size_field(b"\x80" + b"\xff" * 11) + END,
    "late-time": head(mtime=1 << 62) + END,
    "early-time": head(mtime=-(1 << 62)) + END,
    "time-that-is-none": extended(b"mtime=nan") + head() + END,
    "time-without-end": extended(b"mtime=inf") + head() + END,
    "time-in-words": extended(b"mtime=now") + head() + END,
    "negative-pax-size": extended(b"size=-5120") + head() + END,
    "nul-in-a-name": extended(b"path=copy/\0a") + head() + END,
    "nul-in-a-link": extended(b"linkpath=a\0b") + head(kind=tarfile.SYMTYPE) + END,
    "pax-without-records": extended_as_it_is(b"0" * 600) + head() + END,
    "pax-record-too-long": extended_as_it_is(b"99 path=x\n") + head() + END,
    "pax-record-of-no-length": extended_as_it_is(b"0 path=x\n") + head() + END,
    "sparse": head(kind=tarfile.GNUTYPE_SPARSE) + END,
    "pax-sparse": extended(b"GNU.sparse.major=1") + head() + END,
}


@pytest.mark.parametrize("stream", BROKEN.values(), ids=BROKEN)
def test_broken_archive_is_refused(stream: bytes) -> None:
    with pytest.raises(VshError, match="broken archive"):
        list(read_members(io.BytesIO(stream)))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_name_of_a_terabyte_is_refused_unread(kind: bytes) -> None:
    stream = io.BytesIO(head_with_size_field(struct.pack(">IQ", 0x80000000, 1 << 40), kind) + bytes(TEXT_BYTES_MAX))
    with pytest.raises(VshError, match=f"a name of {1 << 40} bytes"):
        list(read_members(stream))
    assert stream.tell() == BLOCK_BYTES


def test_any_number_of_extended_heads_is_read_without_recursion() -> None:
    """Python's tarfile ends with a RecursionError at about 500."""
    long_name = head(kind=tarfile.GNUTYPE_LONGNAME, size=5) + b"long\0".ljust(BLOCK_BYTES, b"\0")
    names = [member.name for member, _ in read_members(io.BytesIO(long_name * 5000 + head() + END))]
    assert names == ["long"]


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_programs_are_read_whole(tmp_path: Path, layout: int) -> None:
    """Long names, bytes that are no text, a time before 1970, whole and broken blocks, data that is skipped."""
    sizes = [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, 600_000]
    names = ["a", "b/" * 40 + "c", "\udcff\n", "d" * 90, "last"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w|", format=layout, errors="surrogateescape") as tar:
        for name, size in zip(names, sizes, strict=True):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 10 if layout == tarfile.USTAR_FORMAT else -10
            tar.addfile(member, io.BytesIO(b"x" * size))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "t" * (90 if layout == tarfile.USTAR_FORMAT else 300)
        tar.addfile(link)
    stream.seek(0)
    found = []
    for number, (read, data) in enumerate(read_members(stream)):
        found.append((read.name, read.size))
        if read.is_file and number % 2:
            assert b"".join(data) == b"x" * sizes[number]
        if read.is_symlink:
            assert read.linkname == link.linkname
    assert found == [*zip(names, sizes, strict=True), ("link", 0)]
