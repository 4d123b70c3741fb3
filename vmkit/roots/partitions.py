"""Partition tables, as firmware and kernel read them: GPT (UEFI 2.10, chapter 5) and MBR with logical partitions.

Pure: a reader gives bytes at an offset, fewer where the disk ends. A GPT is believed only when its checksums are right;
where the primary table is broken, its backup at the disk's end is read.
"""

import struct
import uuid
import zlib
from dataclasses import dataclass

from vmkit.errors import BuildError
from vmkit.roots.superblocks import Reader

# A sector of 4096 bytes is that of some large disks, and of disk images made on them.
_SECTORS = (512, 4096)
_GPT_MAGIC = b"EFI PART"
_HEADER_BYTES = 92
# The usual table has 128. Linux reads whatever fits in memory.
_ENTRY_LIMIT = 1024
_ENTRY_BYTES_LIMIT = 4096
# Linux stops at 255 partitions (DISK_MAX_PARTS); a loop of extended partitions has no end.
_LOGICAL_LIMIT = 250
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_REPAIR = "repair it with sgdisk or fdisk, or give a disk image with only the root file system"

# The types that matter for the choice of a root (UAPI group, Discoverable Partitions Specification).
_ROOTS = {
    uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"): "root (x86-64)",
    uuid.UUID("b921b045-1df0-41c3-af44-4c6f280d3fae"): "root (arm64)",
    uuid.UUID("72ec70a6-cf74-40e6-bd49-4bda08e8f224"): "root (riscv64)",
    uuid.UUID("5eead9a9-fe09-4a1e-a1d7-520d00531306"): "root (s390x)",
}
LINUX_DATA = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_NAMES = {
    **_ROOTS,
    LINUX_DATA: "Linux",
    uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"): "EFI system",
    uuid.UUID("21686148-6449-6e6f-744e-656564454649"): "BIOS boot",
    uuid.UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172"): "boot loader",
    uuid.UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"): "swap",
    uuid.UUID("933ac7e1-2eb4-4f13-b844-0e14e2aef915"): "home",
    uuid.UUID("e6d6d379-f507-44c2-a23c-238f2a3df928"): "LVM",
}
_MBR_NAMES = {0x83: "Linux", 0x82: "swap", 0xEF: "EFI system", 0x8E: "LVM", 0x07: "NTFS", 0x0C: "FAT", 0x0B: "FAT"}
# A table names these as a root.
ROOTS = frozenset(_ROOTS.values())
# A table names these as something that is never a root.
NEVER_ROOT = frozenset({"EFI system", "BIOS boot", "boot loader", "swap", "home", "LVM"})


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition, with the number that Linux gives it. what: its type in words. name: GPT's, for people."""

    number: int
    offset_bytes: int
    size_bytes: int
    what: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A partition table. kind: `gpt` or `mbr`. note: what a person should know of it; empty otherwise.

    sector_bytes: Linux finds the partitions only on a disk with such sectors.
    """

    kind: str
    partitions: tuple[Partition, ...]
    sector_bytes: int = 512
    note: str = ""


def find_type_name(kind: uuid.UUID) -> str:
    """What a partition's type of GPT is called."""
    return _NAMES.get(kind, str(kind))


def read_table(read: Reader, size_bytes: int) -> Table | None:
    """The disk's partition table, or None where it has none. Raises BuildError for one that is there and broken."""
    for sector in _SECTORS:
        partitions = _read_gpt(read, sector, sector, size_bytes)
        if partitions is not None:
            return Table("gpt", partitions, sector)
    for sector in _SECTORS:
        last = size_bytes // sector * sector - sector
        partitions = _read_gpt(read, last, sector, size_bytes) if last > sector else None
        # An old backup, on a disk that was partitioned anew without GPT, is none.
        if partitions is not None and (_is_protected(read) or read(sector, 8) == _GPT_MAGIC):
            return Table("gpt", partitions, sector, "the primary partition table is broken, and its backup is used")
    if _is_protected(read) or any(read(sector, 8) == _GPT_MAGIC for sector in _SECTORS):
        raise BuildError("the partition table (GPT) is broken, and so is its backup", hint=_REPAIR)
    return _read_mbr(read, size_bytes)


def _is_protected(read: Reader) -> bool:
    block = read(0, 512)
    return block[510:] == b"\x55\xaa" and any(block[446 + 16 * i + 4] == _PROTECTIVE for i in range(4))


def _read_gpt(read: Reader, at: int, sector: int, size_bytes: int) -> tuple[Partition, ...] | None:
    """The partitions of a header whose two checksums are right; None otherwise."""
    block = read(at, sector)
    if len(block) < sector or block[:8] != _GPT_MAGIC:
        return None
    header_bytes, header_crc = struct.unpack_from("<II", block, 12)
    own = struct.unpack_from("<Q", block, 24)[0]
    entries_at, count, entry_bytes, entries_crc = struct.unpack_from("<QIII", block, 72)
    if not _HEADER_BYTES <= header_bytes <= sector or own * sector != at:
        return None
    if zlib.crc32(block[:16] + bytes(4) + block[20:header_bytes]) != header_crc:
        return None
    if not (count <= _ENTRY_LIMIT and 128 <= entry_bytes <= _ENTRY_BYTES_LIMIT):
        return None
    table = read(entries_at * sector, count * entry_bytes)
    if len(table) != count * entry_bytes or zlib.crc32(table) != entries_crc:
        return None
    found = []
    for number in range(count):
        entry = table[number * entry_bytes : (number + 1) * entry_bytes]
        if not any(entry[:16]):
            continue
        kind = uuid.UUID(bytes_le=entry[:16])
        first, last = struct.unpack_from("<QQ", entry, 32)
        name = entry[56:128].decode("utf-16-le", errors="replace").split("\0")[0]
        what = find_type_name(kind)
        found.append(_check(Partition(number + 1, first * sector, (last + 1 - first) * sector, what, name), size_bytes))
    return tuple(found)


def _read_mbr(read: Reader, size_bytes: int) -> Table | None:
    """The four primary partitions and the logical ones; None where the sector is no MBR.

    A file system's boot sector ends in the same two bytes, so the entries must make sense, too.
    """
    block = read(0, 512)
    if len(block) < 512 or block[510:] != b"\x55\xaa":
        return None
    entries = [_read_entry(block, number) for number in range(4)]
    used = [entry for entry in entries if entry[1]]
    if not used or any(status not in (0, 0x80) or not start or not count for status, _, start, count in used):
        return None
    if any(start * 512 >= size_bytes for _, _, start, _ in used):
        return None
    found: list[Partition] = []
    logical: list[Partition] = []
    for number, (_, kind, start, count) in enumerate(entries, start=1):
        if kind in _EXTENDED:
            logical += _read_logical(read, start, size_bytes, 5 + len(logical))
        elif kind:
            found.append(_make(number, kind, start, count, size_bytes))
    return Table("mbr", (*found, *logical))


def _read_logical(read: Reader, extended: int, size_bytes: int, number: int) -> list[Partition]:
    """The chain of extended boot records: each has one partition and the place of the next record."""
    found: list[Partition] = []
    place, seen = extended, {extended}
    while True:
        block = read(place * 512, 512)
        if len(block) < 512 or block[510:] != b"\x55\xaa":
            raise BuildError("the table of logical partitions (MBR) is broken", hint=_REPAIR)
        _, kind, start, count = _read_entry(block, 0)
        if kind and start and count:
            found.append(_make(number + len(found), kind, place + start, count, size_bytes))
        _, kind, start, _ = _read_entry(block, 1)
        if kind not in _EXTENDED or not start:
            return found
        place = extended + start
        if place in seen or len(seen) > _LOGICAL_LIMIT:
            raise BuildError("the table of logical partitions (MBR) has no end", hint=_REPAIR)
        seen.add(place)


def _read_entry(block: bytes, number: int) -> tuple[int, int, int, int]:
    """Status, type, first sector, count of sectors."""
    at = 446 + 16 * number
    start, count = struct.unpack_from("<II", block, at + 8)
    return block[at], block[at + 4], start, count


def _make(number: int, kind: int, start: int, count: int, size_bytes: int) -> Partition:
    what = _MBR_NAMES.get(kind, f"type {kind:#04x}")
    return _check(Partition(number, start * 512, count * 512, what), size_bytes)


def _check(partition: Partition, size_bytes: int) -> Partition:
    end = partition.offset_bytes + partition.size_bytes
    if partition.size_bytes <= 0 or end > size_bytes:
        raise BuildError(
            f"partition {partition.number} ends at byte {end}, and the disk has {size_bytes}",
            hint="the file is not whole: copy or download it again",
        )
    return partition
