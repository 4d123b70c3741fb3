"""File systems by their superblocks: which one it is, its label, and how many bytes it needs.

Pure: a reader gives bytes at an offset, fewer where the disk ends. Offsets are those of the kernel's own headers. A
superblock is checked beyond its magic, for old ones stay on disks that were formatted anew.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

# Gives the bytes from an offset on, fewer at the end of the disk.
Reader = Callable[[int, int], bytes]

_BTRFS_AT = 64 << 10
_LABEL_ENCODING = "utf-8"


class FileSystemKind(StrEnum):
    """What `mount -t` calls a file system that a guest can have as its root."""

    EXT4 = "ext4"
    SQUASHFS = "squashfs"
    EROFS = "erofs"
    XFS = "xfs"
    BTRFS = "btrfs"


@dataclass(frozen=True, slots=True)
class FileSystem:
    """One file system. size_bytes: what it claims. trouble: why it cannot be mounted as it is; empty otherwise."""

    kind: FileSystemKind
    label: str
    size_bytes: int
    trouble: str = ""


def find_file_system(read: Reader) -> FileSystem | None:
    """The file system that begins at offset 0, if it is one of FileSystemKind."""
    for find in (_find_squashfs, _find_xfs, _find_erofs, _find_ext4, _find_btrfs):
        found = find(read)
        if found is not None:
            return found
    return None


def _find_ext4(read: Reader) -> FileSystem | None:
    """struct ext4_super_block (fs/ext4/ext4.h), 1024 bytes after the start. ext2 and ext3 are mounted as ext4, too."""
    block = read(1024, 512)
    if len(block) < 512 or block[56:58] != b"\x53\xef":
        return None
    inodes, blocks_low = struct.unpack_from("<II", block, 0)
    log_block_size = struct.unpack_from("<I", block, 24)[0]
    incompatible = struct.unpack_from("<I", block, 96)[0]
    blocks = blocks_low | (struct.unpack_from("<I", block, 0x150)[0] << 32 if incompatible & 0x80 else 0)
    # EXT4_FEATURE_INCOMPAT_JOURNAL_DEV holds no files.
    if log_block_size > 6 or not inodes or not blocks or incompatible & 0x8:
        return None
    trouble = ""
    if incompatible & 0x4:
        trouble = "its journal was not replayed, because it was not unmounted"
    return FileSystem(FileSystemKind.EXT4, _read_label(block[120:136]), blocks << (10 + log_block_size), trouble)


def _find_squashfs(read: Reader) -> FileSystem | None:
    """struct squashfs_super_block (fs/squashfs/squashfs_fs.h)."""
    block = read(0, 96)
    if len(block) < 96 or block[:4] != b"hsqs":
        return None
    major = struct.unpack_from("<H", block, 28)[0]
    size = struct.unpack_from("<Q", block, 40)[0]
    return FileSystem(FileSystemKind.SQUASHFS, "", size) if major == 4 and size >= 96 else None


def _find_erofs(read: Reader) -> FileSystem | None:
    """struct erofs_super_block (fs/erofs/erofs_fs.h), 1024 bytes after the start."""
    block = read(1024, 128)
    if len(block) < 128 or block[:4] != b"\xe2\xe1\xf5\xe0":
        return None
    shift = block[12]
    blocks = struct.unpack_from("<I", block, 36)[0]
    if not 9 <= shift <= 16 or not blocks:
        return None
    return FileSystem(FileSystemKind.EROFS, _read_label(block[64:80]), blocks << shift)


def _find_xfs(read: Reader) -> FileSystem | None:
    """struct xfs_dsb (fs/xfs/libxfs/xfs_format.h), big endian."""
    block = read(0, 128)
    if len(block) < 128 or block[:4] != b"XFSB":
        return None
    block_size, blocks = struct.unpack_from(">IQ", block, 4)
    if block_size not in [1 << shift for shift in range(9, 17)] or not blocks:
        return None
    return FileSystem(FileSystemKind.XFS, _read_label(block[108:120]), block_size * blocks)


def _find_btrfs(read: Reader) -> FileSystem | None:
    """struct btrfs_super_block (uapi/linux/btrfs_tree.h), 64 KiB after the start."""
    block = read(_BTRFS_AT, 4096)
    if len(block) < 4096 or block[0x40:0x48] != b"_BHRfS_M":
        return None
    place, size = struct.unpack_from("<Q", block, 0x30)[0], struct.unpack_from("<Q", block, 0x70)[0]
    devices = struct.unpack_from("<Q", block, 0x88)[0]
    if place != _BTRFS_AT or not size or not devices:
        return None
    trouble = f"it is spread over {devices} disks" if devices > 1 else ""
    return FileSystem(FileSystemKind.BTRFS, _read_label(block[0x12B:0x22B]), size, trouble)


def _read_label(field: bytes) -> str:
    return field.split(b"\0")[0].decode(_LABEL_ENCODING, errors="replace").strip()


# What is often beside a root, or in its place. Offset, bytes, words.
_OTHERS = (
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (512, b"LABELONE", "a volume group (LVM)"),
    (24, b"LABELONE", "a volume group (LVM)"),
    (4086, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS    ", "NTFS"),
    (82, b"FAT32", "FAT"),
    (54, b"FAT1", "FAT"),
    (0x8001, b"CD001", "a CD's file system (ISO 9660)"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
)


def describe_other(read: Reader) -> str:
    """Names what a disk holds in place of a known file system. Empty where that is unknown, too."""
    for at, magic, words in _OTHERS:
        if read(at, len(magic)) == magic:
            return words
    return ""
