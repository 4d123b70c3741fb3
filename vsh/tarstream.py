"""Reads an untrusted tar stream: member after member, in bounded memory, without recursion.

Python's tarfile trusts an archive's sizes: it reads a name of a terabyte into memory, follows 1,000 extended headers by
recursion, and keeps every member. Here each number has a range. Owns the format: POSIX ustar and pax, and GNU's long
names, but no sparse maps. Knows nothing of files.
"""

import tarfile
from collections.abc import Iterator
from typing import IO

from vsh.errors import VshError

BLOCK_BYTES = 512
# Of a name, a link's target, or a pax header: Linux takes paths of 4096 bytes.
TEXT_BYTES_MAX = 1 << 20
SIZE_BYTES_MAX = 1 << 62
# Seconds before and after 1970 that every file system and library takes: to the year 4000.
TIME_S_MAX = 1 << 36
CHUNK_BYTES = 1 << 18
_ENCODING = ("utf-8", "surrogateescape")


class Member:
    """One member's head. Invariant: its numbers are in their ranges, and no text has a NUL."""

    __slots__ = ("kind", "linkname", "mode", "mtime", "name", "size")

    def __init__(self, header: tarfile.TarInfo, texts: dict[str, str]) -> None:
        """texts: values of extended headers that replace the header's own, by pax keyword. Raises VshError."""
        self.kind = header.type
        self.mode = header.mode & 0o7777
        self.name = texts.get("path", header.name)
        self.linkname = texts.get("linkpath", header.linkname)
        try:
            self.size = int(texts.get("size", header.size))
            self.mtime = float(texts.get("mtime", header.mtime))
        except ValueError as error:
            raise broken("a number that is none") from error
        if not 0 <= self.size <= SIZE_BYTES_MAX or not -TIME_S_MAX <= self.mtime <= TIME_S_MAX:
            raise broken(f"a size of {self.size} or a time of {self.mtime:.0f}")
        if "\0" in self.name + self.linkname:
            raise broken("a name with a NUL")
        if not self.is_file:
            # A link's size is its target's, and directories have none.
            self.size = self.size if self.kind not in _WITHOUT_DATA else 0

    @property
    def is_file(self) -> bool:
        """A regular file."""
        return self.kind in tarfile.REGULAR_TYPES

    @property
    def is_folder(self) -> bool:
        """A directory."""
        return self.kind == tarfile.DIRTYPE

    @property
    def is_symlink(self) -> bool:
        """A symbolic link."""
        return self.kind == tarfile.SYMTYPE

    @property
    def is_hard_link(self) -> bool:
        """Another name of a member before it."""
        return self.kind == tarfile.LNKTYPE


_WITHOUT_DATA = (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


def read_members(stream: IO[bytes]) -> "Iterator[tuple[Member, Iterator[bytes]]]":
    """Yields each member with its data, and skips data that the caller left. Raises VshError, and read's OSError."""
    texts: dict[str, str] = {}
    while (header := _read_header(stream)) is not None:
        kind = header.type
        if kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _read_text(stream, header.size).partition(b"\0")[0]
            texts["path" if kind == tarfile.GNUTYPE_LONGNAME else "linkpath"] = text.decode(*_ENCODING)
        elif kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            texts |= _parse_records(_read_text(stream, header.size))
        elif kind == tarfile.XGLTYPE:
            # Comments of the program that wrote it.
            _read_text(stream, header.size)
        elif kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in texts):
            raise broken("a sparse map")
        else:
            member = Member(header, texts)
            texts = {}
            data = _read_data(stream, member.size)
            yield member, data
            for _ in data:
                pass


def broken(what: str) -> VshError:
    """Returns the error for a stream that is no archive, or has impossible values."""
    return VshError(f"the guest sent a broken archive: {what}")


def _read_header(stream: IO[bytes]) -> tarfile.TarInfo | None:
    """Reads the next header; None at the archive's end."""
    block = _read_exactly(stream, BLOCK_BYTES)
    if not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, *_ENCODING)
    except (tarfile.TarError, ValueError) as error:
        raise broken(str(error)) from error


def _read_text(stream: IO[bytes], size: int) -> bytes:
    if not 0 <= size <= TEXT_BYTES_MAX:
        raise broken(f"a name of {size} bytes")
    return _read_exactly(stream, _pad(size))[:size]


def _read_data(stream: IO[bytes], size: int) -> Iterator[bytes]:
    left = size
    while left:
        data = _read_exactly(stream, min(left, CHUNK_BYTES))
        left -= len(data)
        yield data
    _read_exactly(stream, _pad(size) - size)


def _read_exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise broken("it ends too early")
    return data


def _pad(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _parse_records(data: bytes) -> dict[str, str]:
    """Reads the records of a pax header: `length key=value` and a newline. The length counts the whole record."""
    texts: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        size = int(digits) if digits.isdigit() and len(digits) <= len(str(TEXT_BYTES_MAX)) else 0
        record, data = data[:size], data[size:]
        key, mark, value = record[len(digits) + 1 : -1].partition(b"=")
        if not mark or len(record) != size or not record.endswith(b"\n"):
            raise broken("a pax header without records")
        texts[key.decode(*_ENCODING)] = value.decode(*_ENCODING)
    return texts
