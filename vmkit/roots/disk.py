"""Chooses the root in a disk: the whole disk where it is one file system, else one of its partitions.

Pure: a reader gives bytes at an offset. The choice is never a guess: where two partitions could be the root, the error
lists them, and the user chooses.
"""

from dataclasses import dataclass

from vmkit.errors import ConfigError
from vmkit.roots.partitions import NEVER_ROOT, ROOTS, Partition, Table, read_table
from vmkit.roots.superblocks import FileSystem, Reader, describe_other, find_file_system

_KINDS = "ext4, squashfs, erofs, xfs and btrfs"
_CHOOSE = "choose one: --partition N"


@dataclass(frozen=True, slots=True)
class DiskRoot:
    """The file system that is the root, and the partition that it is in; None where it is the whole disk.

    notes: what a person should know, such as a broken partition table whose backup was used.
    """

    file_system: FileSystem
    partition: Partition | None
    table: Table | None
    notes: tuple[str, ...] = ()


def choose_root(read: Reader, size_bytes: int, name: str, number: int | None = None) -> DiskRoot:
    """Finds the root of the disk `name`; number is what the user chose with --partition.

    Raises ConfigError where there is none or more than one, BuildError where a table is broken.
    """
    table = read_table(read, size_bytes)
    whole = find_file_system(read)
    # A boot sector is like an MBR, and what a disk was before may remain behind a new partition table.
    if whole is not None and (table is None or (table.kind == "mbr" and not _has_file_systems(read, table))):
        table = None
    elif table is not None:
        whole = None
    if whole is not None:
        if number is not None:
            raise ConfigError(
                f"{name} has no partitions: it is one {whole.kind} file system", hint="leave --partition out"
            )
        return DiskRoot(_check(whole, size_bytes, name), None, None)
    if table is None:
        other = describe_other(read)
        raise ConfigError(
            f"{name} holds {other}, and no root that vmkit can boot" if other else f"vmkit cannot tell what {name} is",
            hint=f"give a tar, a folder, a container image, or a disk with one of {_KINDS}",
        )
    partition, found = _choose(read, table, name, number)
    notes = (table.note,) if table.note else ()
    return DiskRoot(
        _check(found, partition.size_bytes, f"partition {partition.number} of {name}"), partition, table, notes
    )


def _shift(read: Reader, partition: Partition) -> Reader:
    """A reader of the partition alone."""

    def read_inside(offset: int, length: int) -> bytes:
        return read(partition.offset_bytes + offset, max(0, min(length, partition.size_bytes - offset)))

    return read_inside


def _has_file_systems(read: Reader, table: Table) -> bool:
    return any(find_file_system(_shift(read, partition)) for partition in table.partitions)


def _choose(read: Reader, table: Table, name: str, number: int | None) -> tuple[Partition, FileSystem]:
    if number is not None:
        for partition in table.partitions:
            if partition.number == number:
                return partition, _require(read, partition, name)
        raise ConfigError(f"{name} has no partition {number}", details=_render(read, table), hint=_CHOOSE)
    found = {
        partition: file_system
        for partition in table.partitions
        if (file_system := find_file_system(_shift(read, partition))) is not None
    }
    roots = [partition for partition in found if partition.what in ROOTS]
    candidates = roots or [partition for partition in found if partition.what not in NEVER_ROOT]
    if len(candidates) == 1:
        return candidates[0], found[candidates[0]]
    if not candidates:
        raise ConfigError(
            f"no partition of {name} holds a root that vmkit can boot",
            details=_render(read, table),
            hint=f"give a disk with one of {_KINDS}",
        )
    raise ConfigError(
        f"{name} has {len(candidates)} partitions that may be the root", details=_render(read, table), hint=_CHOOSE
    )


def _require(read: Reader, partition: Partition, name: str) -> FileSystem:
    inside = _shift(read, partition)
    found = find_file_system(inside)
    if found is None:
        other = describe_other(inside) or "no file system that vmkit knows"
        raise ConfigError(
            f"partition {partition.number} of {name} holds {other}", hint=f"choose one with {_KINDS}: --partition N"
        )
    return found


def _check(found: FileSystem, size_bytes: int, where: str) -> FileSystem:
    if found.size_bytes > size_bytes:
        raise ConfigError(
            f"{where} is cut off: its {found.kind} has {found.size_bytes} bytes, and {size_bytes} are there",
            hint="the file is not whole: copy or download it again",
        )
    return found


def _render(read: Reader, table: Table) -> str:
    """A line for each partition: number, MiB, type, file system, names."""
    lines = []
    for partition in table.partitions:
        inside = _shift(read, partition)
        found = find_file_system(inside)
        words = [found.kind.value, found.label] if found else [describe_other(inside)]
        named = " ".join(filter(None, (partition.name, *words)))
        lines.append(f"{partition.number}: {partition.size_bytes >> 20} MiB, {partition.what}, {named or 'unknown'}")
    return "\n".join(lines)
