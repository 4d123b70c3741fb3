"""Checks that a file given as a kernel is one that QEMU boots on the machine, and names what it is otherwise.

QEMU reports most files that are no kernel as a kernel too old for an initramfs. The formats of amd64 are those that
QEMU's own loader tells apart (hw/i386/x86.c): a bzImage, an ELF file with a PVH entry, a multiboot image. Those of the
others have their magic in a fixed place (hw/arm/boot.c, Linux's Documentation/arch/riscv/boot-image-header.rst,
hw/s390x/ipl.c).
"""

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from vmkit.architectures import HOST, find_elf_architecture
from vmkit.errors import ConfigError, HostError

# Multiboot's header lies in the first 8 KiB, a bzImage's in its first two sectors.
_HEAD_BYTES = 8192
_BZIMAGE_AT, _BZIMAGE = 0x202, b"HdrS"
_MULTIBOOT = struct.pack("<I", 0x1BADB002)
_ELF = b"\x7fELF"
_ELF_X86_64 = b"\x7fELF\x02\x01"
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_NHDR = struct.Struct("<III")
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
# A kernel has some five program headers and 500 bytes of notes; the fields could claim more.
_PROGRAM_HEADERS_LIMIT = 64
_NOTES_LIMIT_BYTES = 64 << 10

_UNPACK = "unpack it first"
# What people give instead, by where it begins: offset, bytes, name, hint.
_OTHERS = (
    (0, b"\x1f\x8b", "gzip data", f"{_UNPACK}: zcat"),
    (0, b"\xfd7zXZ\0", "xz data", f"{_UNPACK}: xzcat"),
    (0, b"\x28\xb5\x2f\xfd", "zstd data", f"{_UNPACK}: zstdcat"),
    (0, b"\x02\x21\x4c\x18", "lz4 data", f"{_UNPACK}: lz4cat"),
    (0, b"\x04\x22\x4d\x18", "lz4 data", f"{_UNPACK}: lz4cat"),
    (0, b"BZh", "bzip2 data", f"{_UNPACK}: bzcat"),
    (0, b"070701", "an initramfs (cpio)", ""),
    (0, b"!<arch>\ndebian-binary", "a Debian package", "the kernel is in it: dpkg-deb -x PACKAGE FOLDER"),
    (0, b"!<arch>", "a library of object files", ""),
    (0, b"QFI\xfb", "a qcow2 disk", "disks are given with --disk or --root"),
    (0, b"hsqs", "a squashfs file system", "disks are given with --disk or --root"),
    (0x438, b"\x53\xef", "an ext4 file system", "disks are given with --disk or --root"),
    (0, b"MZ", "an EFI program without Linux's boot header", ""),
    (0, b"#!", "a script", ""),
)
_WANTED = {
    "amd64": "a bzImage (arch/x86/boot/bzImage, vmlinuz), or a vmlinux with CONFIG_PVH",
    "arm64": "an Image (arch/arm64/boot/Image)",
    "riscv64": "an Image (arch/riscv/boot/Image)",
    "s390x": "a bzImage (arch/s390/boot/bzImage)",
}
# The kernels of other architectures, by what their boot loaders look for. The last is at 64 KiB.
_MAGICS = (("arm64", 56, b"ARM\x64"), ("riscv64", 0x30, b"RISCV"), ("s390x", 0x10008, b"S390EP"))


def check_kernel(path: Path, architecture: str = HOST) -> None:
    """Raises HostError for a file that cannot be read, ConfigError naming what it is where QEMU cannot boot it.

    architecture: the machine's.
    """
    try:
        # A FIFO is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            head = os.pread(descriptor, _HEAD_BYTES, 0) if is_regular or _is_folder(descriptor) else b""
            trouble = _find_trouble(descriptor, head, architecture) if is_regular else ("not a regular file", "")
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError(
            f"cannot read the kernel {path}: {error.strerror}",
            hint="copy the file, or change its mode: many kernels in /boot are for root only"
            if isinstance(error, PermissionError)
            else "",
        ) from error
    if trouble is not None:
        what, hint = trouble
        raise ConfigError(
            f"{path} is not a kernel that QEMU can boot: it is {what}", hint=hint or f"give {_WANTED[architecture]}"
        )


def _is_folder(descriptor: int) -> bool:
    """A folder is read, too, so that the system's own error names it."""
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _find_trouble(descriptor: int, head: bytes, architecture: str) -> tuple[str, str] | None:
    """What a file is and what to do, or None for a kernel."""
    found = _find_architecture(descriptor, head)
    if found not in ("", architecture):
        what = f"an ELF file for {found}" if head.startswith(_ELF) else f"a kernel for {found}"
        return what, f"the machine is {architecture}; for one of {found}: --arch {found}"
    if found and found != HOST and not head.startswith(_ELF):
        return None
    if architecture == HOST and _is_pc_kernel(head):
        return None
    if not head:
        return "empty", ""
    if head.startswith(_ELF):
        return _find_elf_trouble(descriptor, head) if architecture == HOST else ("an ELF file", "")
    for at, magic, name, hint in _OTHERS:
        if head[at : at + len(magic)] == magic:
            return name, hint
    return "of an unknown format", ""


def _find_architecture(descriptor: int, head: bytes) -> str:
    """For which architecture a file is, as far as it says so; else ""."""
    for name, at, magic in _MAGICS:
        if _pread(descriptor, len(magic), at) == magic:
            return name
    return HOST if _is_pc_kernel(head) else find_elf_architecture(head)


def _is_pc_kernel(head: bytes) -> bool:
    return head[_BZIMAGE_AT : _BZIMAGE_AT + len(_BZIMAGE)] == _BZIMAGE or _MULTIBOOT in head


def _find_elf_trouble(descriptor: int, head: bytes) -> tuple[str, str] | None:
    if not head.startswith(_ELF_X86_64) or len(head) < _EHDR.size:
        return "an ELF file that is not of 64 bits", ""
    if not find_elf_architecture(head):
        return "an ELF file of another processor", ""
    if any(name == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY for name, kind in _read_notes(descriptor, head)):
        return None
    return (
        "an ELF file without a PVH entry",
        "build the kernel with CONFIG_PVH=y, or give the bzImage that the same build made",
    )


def _read_notes(descriptor: int, head: bytes) -> Iterator[tuple[bytes, int]]:
    """The name and type of each note of an ELF file (elf.h, Elf64_Nhdr)."""
    header = _EHDR.unpack_from(head)
    offset, count = header[5], min(header[10], _PROGRAM_HEADERS_LIMIT)
    table = _pread(descriptor, count * _PHDR.size, offset)
    for at in range(0, len(table) - _PHDR.size + 1, _PHDR.size):
        kind, _, start, _, _, size, _, _ = _PHDR.unpack_from(table, at)
        notes = _pread(descriptor, min(size, _NOTES_LIMIT_BYTES), start) if kind == _PT_NOTE else b""
        place = 0
        while place + _NHDR.size <= len(notes):
            name_bytes, value_bytes, note = _NHDR.unpack_from(notes, place)
            name_at = place + _NHDR.size
            yield notes[name_at : name_at + name_bytes], note
            place = name_at + name_bytes + -name_bytes % 4 + value_bytes + -value_bytes % 4


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """Less, or nothing, where the file ends before; an offset may be any number."""
    try:
        return os.pread(descriptor, size, offset)
    except (OSError, OverflowError):
        return b""
