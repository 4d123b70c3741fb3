"""Makes the root's ext4 as large as its disk: `/init` calls it, where the host has seen that the disk became larger.

The kernel does it, while the file system is mounted. So neither the host nor the root needs a program for it.
"""

import fcntl
import os
import sys

# _IOW('f', 16, __u64) of fs/ext4/ext4.h: the number of blocks that the file system is to have.
EXT4_IOC_RESIZE_FS = 0x40086610


def main(argv: list[str] | None = None) -> None:
    """argv: the disk, and where it is mounted. A file system that cannot grow is used as it is."""
    disk, place = sys.argv[1:] if argv is None else argv
    try:
        grow(disk, place)
    except OSError as error:
        text = f"vmkit-init: warning: the root stays as small as it was: {error.strerror}\n"
        os.write(2, text.encode("utf-8", "replace"))


def grow(disk: str, place: str) -> None:
    """Makes the file system at `place` fill its disk. Raises OSError."""
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        blocks = size // os.fstatvfs(fd).f_bsize
        fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, blocks.to_bytes(8, sys.byteorder))
    finally:
        os.close(fd)
