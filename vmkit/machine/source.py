"""A path in the place of an image's name: a disk that a machine has as its root, in the image `any`.

Reads the first bytes of a file, and nothing else of it.
"""

import os
import re
import stat
from pathlib import Path

from vmkit.errors import ConfigError, HostError
from vmkit.machine.spec import MAX_NAME_CHARACTERS

# Its guest takes any root (images/any.toml).
ANY = "any"
# Where and how each file system begins, by the name that mount(8) has for it: s_magic of struct ext4_super_block at
# 1024 (fs/ext4/ext4.h), of squashfs_super_block at 0, of erofs_super_block at 1024.
_MAGICS = (
    ("ext4", 1024 + 56, b"\x53\xef"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
)
HEAD_BYTES = 2048
KNOWN = "ext4, squashfs or erofs"
_HINT = f"a root is the file system itself, without a partition table: {KNOWN}"


def find_source(image: str) -> Path | None:
    """The disk that stands for an image; None for an image's name or a recipe's path.

    Raises ConfigError for a file that is neither a disk nor a recipe, HostError for one that cannot be read.
    """
    if "/" not in image or image.endswith(".toml"):
        return None
    path = Path(image).expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"there is no disk or recipe {path}", hint="`vmkit images` lists the shipped images")
    if path.is_dir():
        raise ConfigError(f"{path} is a directory", hint="make a disk of it: mke2fs -t ext4 -d FOLDER FILE SIZE")
    head = read_head(path, "the root")
    if find_file_system(head):
        return path
    # Recipes are text, and a new disk is empty.
    if head and b"\0" not in head:
        return None
    raise ConfigError(f"{path} holds no file system that a guest can have as its root", hint=_HINT)


def find_file_system(head: bytes) -> str:
    """The type of the file system that begins so; empty for one that is not known. Pure."""
    return next((name for name, at, magic in _MAGICS if head[at : at + len(magic)] == magic), "")


def read_root_type(root: Path) -> str:
    """The type of a root's file system. Raises HostError."""
    found = find_file_system(read_head(root, "the root"))
    if not found:
        raise HostError(f"the root {root} holds no file system of those: {KNOWN}", hint=_HINT)
    return found


def name_machine(root: Path) -> str:
    """The name of a machine after its root's file."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", root.stem).strip("._-")[:MAX_NAME_CHARACTERS]
    return stem or ANY


def read_head(path: Path, what: str, *, write: bool = False) -> bytes:
    """The first bytes of a file or block device that can be opened as needed. Raises HostError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HostError(f"cannot use {what} {path}: it is a directory")
        # Opening a FIFO would wait for its other end.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise HostError(f"cannot use {what} {path}: it is neither a file nor a block device")
        with path.open("r+b" if write else "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        hint = "a new one of 1 GiB: truncate -s 1G FILE" if isinstance(error, FileNotFoundError) and write else ""
        raise HostError(f"cannot use {what} {path}: {os.strerror(error.errno or 0)}", hint=hint) from error
