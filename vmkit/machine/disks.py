"""Files of the host's that become a guest's disks, and the port for gdb, looked at before QEMU is: clear words instead
of QEMU's.

What can only be known when QEMU opens them (another machine has the file) is told by vmkit.monitor.end from its words.
"""

import os
import socket
import stat
from pathlib import Path

from vmkit.errors import HostError
from vmkit.machine.spec import DiskMode, DiskSpec

_QCOW2_MAGIC = b"QFI\xfb"
# struct ext4_super_block at 1024, s_magic at 56 in it (fs/ext4/ext4.h).
_EXT4_MAGIC_AT, _EXT4_MAGIC = 1024 + 56, b"\x53\xef"
_SECTOR_BYTES = 512
LOOPBACK = "127.0.0.1"


def check_disk(disk: DiskSpec) -> None:
    """Raises HostError for what QEMU could not take as a disk."""
    head = _read_head(disk.path, "the disk", write=disk.mode is DiskMode.READ_WRITE)
    is_named_qcow2, is_qcow2 = disk.path.suffix == ".qcow2", head.startswith(_QCOW2_MAGIC)
    if is_qcow2 != is_named_qcow2:
        seen = "holds a qcow2 image and is not named so" if is_qcow2 else "is named .qcow2 and is none"
        raise HostError(f"the disk {disk.path} {seen}", hint="a disk is raw, unless its name ends in .qcow2")


def check_root(root: Path) -> None:
    """Raises HostError for what no guest could mount as its root."""
    head = _read_head(root, "the root", write=False)
    if head[_EXT4_MAGIC_AT : _EXT4_MAGIC_AT + 2] != _EXT4_MAGIC:
        raise HostError(
            f"the root {root} holds no ext4 file system",
            hint="a root is the file system itself, without a partition table: mke2fs -t ext4 -d FOLDER FILE SIZE",
        )


def check_gdb_port(port: int) -> None:
    """Raises HostError when somebody listens there. Whoever comes between this look and QEMU is told by QEMU."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            raise HostError(
                f"gdb's port {port} cannot be used: {os.strerror(error.errno or 0)}",
                hint="choose another, or take a socket: --gdb alone",
            ) from error


def _read_head(path: Path, what: str, *, write: bool) -> bytes:
    """The first bytes of a file or block device that can be opened as needed."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HostError(f"cannot use {what} {path}: it is a directory")
        # Opening a FIFO would wait for its other end.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise HostError(f"cannot use {what} {path}: it is neither a file nor a block device")
        with path.open("r+b" if write else "rb") as file:
            head = file.read(_EXT4_MAGIC_AT + 2)
    except OSError as error:
        hint = "a new one of 1 GiB: truncate -s 1G FILE" if isinstance(error, FileNotFoundError) and write else ""
        raise HostError(f"cannot use {what} {path}: {os.strerror(error.errno or 0)}", hint=hint) from error
    if len(head) < _SECTOR_BYTES:
        raise HostError(f"cannot use {what} {path}: it is smaller than one sector of {_SECTOR_BYTES} bytes")
    return head
