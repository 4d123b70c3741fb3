"""How much memory a guest needs to boot: found from its kernel and its initramfs, before QEMU starts.

With less the kernel deadlocks on memory, resets without a message, or leaves files of the initramfs out. While it boots
a guest holds the kernel, the initramfs and what it unpacks to. A root in memory may take half of what is free then
(mm/shmem.c, shmem_default_max_blocks). Measured with Debian's kernel 6.12 under TCG.
"""

import os
import struct
from pathlib import Path

from vmkit.errors import BuildError, ConfigError

MIB = 1 << 20
# A kernel and the first programs in a root on a disk: Debian's kernel boots with 72 MiB, and not with 64.
SYSTEM_MIB = 30
_HEAD_BYTES = 4096
# arch/x86/include/uapi/asm/bootparam.h, setup_header: header, init_size.
_BZIMAGE_AT, _BZIMAGE, _INIT_SIZE_AT = 0x202, b"HdrS", 0x260
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_CPIO, _GZIP, _LZ4, _ZSTD = b"070701", b"\x1f\x8b", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"
# The kernel's list of its pages (a 64th part of memory), and as much again for what else grows with it.
_GROWTH = 32
# zstd's own memory: a window of 8 MiB at level 19, and its tables.
_ZSTD_BYTES = 16 * MIB
# No initramfs packs better than this. Where memory suffices even at this ratio, its unpacked size is not measured.
_RATIO_MAX = 10
_UNPACKED_LIMIT_BYTES = 1 << 30


def check_guest_memory(memory_mib: int, kernel: Path, initrd: Path) -> None:
    """Raises ConfigError when these two cannot boot in so much memory."""
    try:
        needed_mib = find_needed_mib(memory_mib, kernel, initrd)
    except OSError:
        # QEMU reports a file that cannot be read.
        return
    if memory_mib < needed_mib:
        raise ConfigError(
            f"--memory must be at least {needed_mib} MiB for this kernel and initramfs, not {memory_mib}",
            hint=f"at least {needed_mib}",
        )


def find_needed_mib(memory_mib: int, kernel: Path, initrd: Path) -> int:
    """The memory, in MiB, that these two surely boot in; computed to the end only where it is above memory_mib.

    It has a margin on purpose, which is most of _GROWTH: the image tiny boots with 96 MiB, and this gives 99. The
    kernel's own needs beside its list of pages differ from version to version, and too little ends in a hang without a
    message.
    """
    kernel_bytes = _find_kernel_bytes(_read_head(kernel))
    packed_bytes = initrd.stat().st_size
    unpacked_bytes = packed_bytes
    head = _read_head(initrd)
    worker_bytes = _ZSTD_BYTES if head.startswith(_ZSTD) else 0
    if not head.startswith(_CPIO) and memory_mib * MIB < kernel_bytes + packed_bytes * (1 + 2 * _RATIO_MAX):
        unpacked_bytes = _find_unpacked_bytes(initrd.read_bytes())
    needed_bytes = kernel_bytes + packed_bytes + 2 * unpacked_bytes + worker_bytes
    needed_bytes = max(kernel_bytes + SYSTEM_MIB * MIB, needed_bytes + needed_bytes // _GROWTH)
    return -(-needed_bytes // MIB)


def _find_kernel_bytes(head: bytes) -> int:
    """What a kernel's code and data take in memory; 0 where its format does not tell."""
    if head[_BZIMAGE_AT : _BZIMAGE_AT + len(_BZIMAGE)] == _BZIMAGE and len(head) >= _INIT_SIZE_AT + 4:
        return int.from_bytes(head[_INIT_SIZE_AT : _INIT_SIZE_AT + 4], "little")
    if not head.startswith(b"\x7fELF\x02\x01") or len(head) < _EHDR.size:
        return 0
    header = _EHDR.unpack_from(head)
    places = range(header[5], min(len(head) - _PHDR.size + 1, header[5] + header[10] * _PHDR.size), _PHDR.size)
    segments = [_PHDR.unpack_from(head, at) for at in places]
    loaded = [(start, start + size) for kind, _, _, _, start, _, size, _ in segments if kind == _PT_LOAD]
    return max(end for _, end in loaded) - min(start for start, _ in loaded) if loaded else 0


def _find_unpacked_bytes(packed: bytes) -> int:
    """The size of an initramfs when unpacked; as it is where it is in no format that an image has."""
    # Only for a machine with little memory.
    from vmkit.image.formats.lz4 import unpack_lz4  # noqa: PLC0415
    from vmkit.image.formats.packed import unpack_gzip, unpack_zstd  # noqa: PLC0415

    for magic, unpack in ((_GZIP, unpack_gzip), (_LZ4, unpack_lz4), (_ZSTD, unpack_zstd)):
        if packed.startswith(magic):
            try:
                return len(unpack(packed, _UNPACKED_LIMIT_BYTES))
            except BuildError:
                break
    return len(packed)


def _read_head(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.pread(descriptor, _HEAD_BYTES, 0)
    finally:
        os.close(descriptor)
