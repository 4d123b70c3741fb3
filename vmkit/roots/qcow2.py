"""A qcow2 disk as its guest sees it, as far as partition tables and superblocks need it (QEMU, docs/interop/qcow2.txt).

Pure: readers give bytes at an offset. A disk that names other files of the host is refused, unless the user has named
each of them: who made the disk must not choose which of the user's files a guest reads.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError, ConfigError
from vmkit.roots.superblocks import Reader

MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
# Version 3: incompatible, compatible and autoclear features, refcount order, header's length.
_HEADER_3 = struct.Struct(">QQQII")
_CORRUPT, _DATA_FILE, _COMPRESSION_TYPE, _LONG_ENTRIES = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_KNOWN_FEATURES = 0b11111
_EXTENSION_DATA_FILE = 0x44415441
# QEMU's own ceilings (block/qcow2.h): QCOW_MAX_L1_SIZE, and a disk of 2 EiB.
_L1_LIMIT_BYTES = 32 << 20
_SIZE_LIMIT_BYTES = 1 << 61
_NAME_LIMIT_BYTES = 1023
_EXTENSION_LIMIT = 64
_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1
_CONVERT = "make one whole disk of it: qemu-img convert -O qcow2 OLD NEW"


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What a qcow2 file says of itself. backing, data: the other files that it needs, as it names them."""

    size_bytes: int
    cluster_bits: int
    l1_offset: int
    l1_count: int
    backing: str = ""
    data: str = ""
    zstd: bool = False
    long_entries: bool = False


def read_header(read: Reader) -> Qcow2Header:
    """Reads and checks the header. Raises BuildError for a damaged one, or one that QEMU itself would refuse."""
    block = read(0, _HEADER.size)
    if len(block) < _HEADER.size or block[:4] != MAGIC:
        raise BuildError("the qcow2 disk has no whole header", hint="the file is not whole: copy or download it again")
    _, version, backing_at, backing_bytes, cluster_bits, size, crypt, l1_count, l1_at, *_ = _HEADER.unpack(block)
    if version not in (2, 3):
        raise BuildError(f"the qcow2 disk has version {version}; vmkit knows 2 and 3", hint=_CONVERT)
    if crypt:
        raise BuildError("the qcow2 disk is encrypted", hint="convert it to one that is not, with qemu-img")
    if not 9 <= cluster_bits <= 21 or l1_count * 8 > _L1_LIMIT_BYTES or size > _SIZE_LIMIT_BYTES:
        raise _refuse("its header has sizes that no disk has")
    features, header_bytes, zstd = 0, _HEADER.size, False
    if version == 3:
        more = read(_HEADER.size, _HEADER_3.size + 8)
        if len(more) < _HEADER_3.size:
            raise _refuse("its header is cut off")
        features, _, _, _, header_bytes = _HEADER_3.unpack_from(more)
        if features & ~_KNOWN_FEATURES:
            raise BuildError(f"the qcow2 disk uses features that vmkit does not know: {features:#x}", hint=_CONVERT)
        if features & _CORRUPT:
            raise _refuse("it is marked as corrupt", "repair it: qemu-img check -r all FILE")
        zstd = bool(features & _COMPRESSION_TYPE and more[_HEADER_3.size : _HEADER_3.size + 1] == b"\1")
    backing = _read_name(read, backing_at, backing_bytes) if backing_at else ""
    data = _read_data_file(read, header_bytes) if features & _DATA_FILE else ""
    return Qcow2Header(size, cluster_bits, l1_at, l1_count, backing, data, zstd, bool(features & _LONG_ENTRIES))


def require_named(header: Qcow2Header, path: Path, named: tuple[Path, ...]) -> tuple[Path, ...]:
    """The other files that the disk at `path` needs. Raises ConfigError for one that the user has not named."""
    needed = []
    for words, name in (("backing file", header.backing), ("data file", header.data)):
        if not name:
            continue
        if name.startswith("json:") or (":" in name.split("/")[0]):
            raise ConfigError(f"{path} has the {words} '{name}', which is no plain file", hint=_CONVERT)
        other = path.parent / name
        if not any(_is_same(other, known) for known in named):
            raise ConfigError(
                f"{path} needs the {words} {other}, which you have not named",
                hint=f"if you trust the disk to read that file, name it, too; else {_CONVERT}",
            )
        needed.append(other)
    return tuple(needed)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


class Qcow2Disk:
    """The content that a guest sees. `read` is a Reader of it; what no file holds reads as zeros.

    backing: a Reader of the backing file's content; data: of the data file.
    """

    def __init__(self, header: Qcow2Header, read: Reader, *, backing: Reader | None = None, data: Reader | None = None):
        self._header = header
        self._read = read
        self._data = data or read
        self._backing = backing
        self._cluster_bytes = 1 << header.cluster_bits
        self._entry_bytes = 16 if header.long_entries else 8
        self.size_bytes = header.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from offset on, fewer at the disk's end. Raises BuildError where the tables are damaged."""
        end = min(offset + length, self.size_bytes)
        parts = []
        while offset < end:
            within = offset % self._cluster_bytes
            taken = min(self._cluster_bytes - within, end - offset)
            parts.append(self._read_in_cluster(offset, within, taken))
            offset += taken
        return b"".join(parts)

    def _read_in_cluster(self, offset: int, within: int, length: int) -> bytes:
        entry, bitmap = self._find_entry(offset)
        if entry & _COMPRESSED:
            return self._unpack(entry)[within : within + length]
        place = entry & _OFFSET_MASK
        # A cluster may be the first of a data file; the first of the qcow2 file itself is its header.
        is_there = bool(place or (self._header.data and entry & _COPIED))
        if self._header.long_entries:
            return b"".join(
                self._read_subcluster(place, bitmap if is_there else bitmap & ~0xFFFFFFFF, offset - within, at, size)
                for at, size in self._split(within, length)
            )
        if entry & _ZERO:
            return bytes(length)
        if not is_there:
            return self._read_backing(offset, length)
        return _fill(self._data(place + within, length), length)

    def _split(self, within: int, length: int) -> list[tuple[int, int]]:
        """The parts of a cluster's range that are each in one of its 32 subclusters."""
        size = self._cluster_bytes // 32
        parts, end = [], within + length
        while within < end:
            taken = min(size - within % size, end - within)
            parts.append((within, taken))
            within += taken
        return parts

    def _read_subcluster(self, place: int, bitmap: int, cluster: int, within: int, length: int) -> bytes:
        bit = within // (self._cluster_bytes // 32)
        if bitmap >> (32 + bit) & 1:
            return bytes(length)
        if not bitmap >> bit & 1:
            return self._read_backing(cluster + within, length)
        return _fill(self._data(place + within, length), length)

    def _find_entry(self, offset: int) -> tuple[int, int]:
        """The L2 entry of the cluster at offset, and its bitmap where entries have one."""
        per_table = self._cluster_bytes // self._entry_bytes
        cluster = offset >> self._header.cluster_bits
        if cluster // per_table >= self._header.l1_count:
            raise _refuse("its first table is too short")
        table = self._read_word(self._header.l1_offset + cluster // per_table * 8) & _OFFSET_MASK
        if not table:
            return 0, 0
        at = table + cluster % per_table * self._entry_bytes
        return self._read_word(at), self._read_word(at + 8) if self._header.long_entries else 0

    def _read_word(self, at: int) -> int:
        word = self._read(at, 8)
        if len(word) < 8:
            raise _refuse("a table of it lies behind its end", "the file is not whole: copy or download it again")
        return int.from_bytes(word, "big")

    def _read_backing(self, offset: int, length: int) -> bytes:
        if self._backing is None:
            return bytes(length)
        # A backing file may be shorter than the disk.
        found = self._backing(offset, length)
        return found + bytes(length - len(found))

    def _unpack(self, entry: int) -> bytes:
        """A compressed cluster: its offset is in the low bits, the number of its further sectors in the high ones."""
        if self._header.zstd:
            raise BuildError(
                "the qcow2 disk is compressed with zstd, which vmkit cannot read",
                hint="convert it: qemu-img convert -O qcow2 OLD NEW",
            )
        split = 62 - (self._header.cluster_bits - 8)
        place = entry & ((1 << split) - 1)
        sectors = (entry >> split & ((1 << (62 - split)) - 1)) + 1
        packed = self._read(place, sectors * 512 - place % 512)
        try:
            # A raw deflate stream, by a compressor whose window is 4 KiB; what follows it in its last sector is junk.
            content = zlib.decompressobj(-15).decompress(packed, self._cluster_bytes)
        except zlib.error as error:
            raise _refuse(f"a compressed cluster of it is damaged ({error})") from error
        if len(content) != self._cluster_bytes:
            raise _refuse("a compressed cluster of it is cut off")
        return content


def _fill(found: bytes, length: int) -> bytes:
    """What lies behind the end of the file reads as zeros, as in QEMU."""
    return found + bytes(length - len(found))


def _read_name(read: Reader, at: int, length: int) -> str:
    if not 0 < length <= _NAME_LIMIT_BYTES:
        raise _refuse(f"the name of its backing file has {length} bytes")
    name = read(at, length)
    if len(name) < length or b"\0" in name:
        raise _refuse("the name of its backing file is cut off")
    return name.decode(errors="replace")


def _read_data_file(read: Reader, at: int) -> str:
    """The extension that names the external data file. Without one the disk cannot be read."""
    for _ in range(_EXTENSION_LIMIT):
        head = read(at, 8)
        if len(head) < 8:
            break
        kind, length = struct.unpack(">II", head)
        if kind == 0:
            break
        if kind == _EXTENSION_DATA_FILE and 0 < length <= _NAME_LIMIT_BYTES:
            return read(at + 8, length).decode(errors="replace")
        at += 8 + -(-length // 8) * 8
    raise _refuse("it needs a data file and does not name it")


def _refuse(why: str, hint: str = "see what is wrong: qemu-img check FILE") -> BuildError:
    return BuildError(f"the qcow2 disk is damaged: {why}", hint=hint)
