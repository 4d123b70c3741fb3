"""A kernel's build tree with real module files, as small as they can be."""

import struct
from collections.abc import Callable
from pathlib import Path

from tests.vmkit.image.conftest import make_elf

VERSION = "6.12.1-mine"
CONFIG = """\
#
# Automatically generated file; DO NOT EDIT.
# Linux/x86 6.12.1 Kernel Configuration
#
CONFIG_64BIT=y
CONFIG_X86_64=y
"""
BASE = (
    *("PCI", "ACPI", "BLK_DEV_INITRD", "BINFMT_ELF", "BINFMT_SCRIPT", "MULTIUSER", "PROC_FS", "SYSFS", "DEVTMPFS"),
    *("SHMEM", "TMPFS", "TTY", "UNIX98_PTYS", "FUTEX", "EPOLL", "SIGNALFD", "TIMERFD", "EVENTFD", "POSIX_TIMERS"),
    *("NET", "UNIX", "SERIAL_8250", "SERIAL_8250_CONSOLE", "VIRTIO_MENU", "VIRTIO_PCI", "BLOCK", "BLK_DEV"),
)
AS_MODULES = ("VSOCKETS", "VIRTIO_VSOCKETS", "OVERLAY_FS", "VIRTIO_BLK", "EXT4_FS")
MODULES = {
    "net/vmw_vsock/vsock.ko": "",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko": "vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko": "vmw_vsock_virtio_transport_common,vsock",
    "fs/overlayfs/overlay.ko": "",
    "fs/ext4/ext4.ko": "jbd2",
    "fs/jbd2/jbd2.ko": "",
    "drivers/block/virtio_blk.ko": "",
    "drivers/gpu/drm/large.ko": "",
}
MakeTree = Callable[..., Path]


def make_bzimage(version: str = VERSION) -> bytes:
    """A kernel's first bytes, as QEMU and file(1) read them (boot.rst)."""
    text = f"{version} (me@here) #1 SMP".encode() + b"\0"
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x20E, 0x300)
    head[0x500 : 0x500 + len(text)] = text
    return bytes(head)


def make_module(depends: str) -> bytes:
    return make_elf(modinfo=f"license=GPL\0depends={depends}\0".encode())


def write_file(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def build_tree(tree: Path, *, without: tuple[str, ...] = (), order: str = "{}.o") -> Path:
    """The build tree of a kernel that boots every machine. without: options that it lacks. order: of modules.order."""
    lines = [f"CONFIG_{name}=y" for name in BASE if name not in without]
    lines += [f"CONFIG_{name}=m" for name in AS_MODULES if name not in without]
    write_file(tree / ".config", CONFIG + "\n".join(lines) + "\n# CONFIG_DMI is not set\n")
    write_file(tree / "include/config/kernel.release", f"{VERSION}\n")
    write_file(tree / "arch/x86/boot/bzImage", make_bzimage())
    write_file(tree / "modules.order", "".join(f"{order.format(path[:-3])}\n" for path in MODULES))
    write_file(tree / "modules.builtin", "kernel/drivers/virtio/virtio_pci.ko\n")
    for path, depends in MODULES.items():
        write_file(tree / path, make_module(depends))
    return tree


def add_section(data: bytes, name: bytes, content: bytes) -> bytes:
    """An ELF file with one section more, as `objcopy --add-section` has it."""
    header = list(struct.unpack_from("<16sHHIQQQIHHHHHH", data))
    at, count, names_at = header[6], header[12], header[13]
    table = [list(struct.unpack_from("<IIQQQQIIQQ", data, at + 64 * number)) for number in range(count)]
    names = data[table[names_at][4] : table[names_at][4] + table[names_at][5]]
    table.append([len(names), 1, 0, 0, len(data), len(content), 0, 0, 1, 0])
    body = data + content
    names += name + b"\0"
    table[names_at][4:6] = len(body), len(names)
    body += names
    header[6], header[12] = len(body), count + 1
    return (
        struct.pack("<16sHHIQQQIHHHHHH", *header)
        + body[64:]
        + b"".join(struct.pack("<IIQQQQIIQQ", *row) for row in table)
    )
