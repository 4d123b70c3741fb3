"""The uncompressed kernel inside a bzImage, which QEMU starts through its PVH entry.

Unpacking the kernel once, here, spares the guest doing it at every start: under TCG that is more than a quarter of a
boot (docs/explanation/decisions.md). Such a kernel is not moved about in memory (no KASLR). Offsets are those of
Documentation/arch/x86/boot.rst.
"""

import struct
from collections.abc import Callable

from vmkit.errors import BuildError
from vmkit.image.formats.elf import has_pvh_entry, is_elf, read_section
from vmkit.image.formats.lz4 import LZ4_LEGACY_MAGIC, unpack_lz4
from vmkit.image.formats.packed import unpack_gzip, unpack_xz, unpack_zstd

# A distribution's kernel is 60 MB; what claims more is not one.
_VMLINUX_LIMIT_BYTES = 512 << 20

_SETUP_SECTORS_AT = 0x1F1
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"
_VERSION_AT, _PAYLOAD_VERSION = 0x206, 0x0208
_PAYLOAD_AT = 0x248
_SECTOR_BYTES = 512
# arch/x86/boot/compressed/Makefile appends the unpacked size to every format that does not carry it.
_SIZE_BYTES = 4


class UnsuitableKernelError(BuildError):
    """This kernel is not made to be started uncompressed; nothing went wrong."""


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel of a bzImage. Raises BuildError for one that is packed in an unknown way or has no PVH entry."""
    vmlinux = _unpack(image)
    if not has_pvh_entry(vmlinux):
        raise UnsuitableKernelError("the kernel has no PVH entry, so QEMU cannot start it uncompressed", hint=_HINT)
    return vmlinux


def find_btf(image: bytes) -> bytes:
    """The BTF of a kernel, as bzImage or ELF; empty when it has none, or cannot be unpacked here."""
    try:
        return read_section(image if is_elf(image) else _unpack(image), ".BTF")
    except BuildError:
        return b""


def _unpack(image: bytes) -> bytes:
    payload = _find_payload(image)
    for magic, unpack in _UNPACKERS.items():
        if payload.startswith(magic):
            return unpack(payload)
    raise UnsuitableKernelError(f"vmkit does not know how this kernel is packed ({payload[:4].hex()})", hint=_HINT)


def find_vmlinux(image: bytes) -> bytes | None:
    """The same, or None for a kernel not made for it. That depends on the image alone: every host builds alike."""
    try:
        return extract_vmlinux(image)
    except UnsuitableKernelError:
        return None


_HINT = 'use it as it is: `kernel_format = "vmlinuz"` in the recipe'


def _find_payload(image: bytes) -> bytes:
    if len(image) < _PAYLOAD_AT + 8 or image[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        raise UnsuitableKernelError("the kernel package's boot image is not a bzImage", hint=_HINT)
    (version,) = struct.unpack_from("<H", image, _VERSION_AT)
    if version < _PAYLOAD_VERSION:
        raise UnsuitableKernelError(
            f"the kernel's boot protocol {version:#x} is too old to find its payload", hint=_HINT
        )
    # Zero setup sectors mean four, for the oldest boot loaders.
    start = ((image[_SETUP_SECTORS_AT] or 4) + 1) * _SECTOR_BYTES
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    payload = image[start + offset : start + offset + length]
    if len(payload) != length or length <= _SIZE_BYTES:
        raise BuildError("the kernel's boot image ends inside its payload")
    return payload


def _unpack_gzip(payload: bytes) -> bytes:
    return _checked(lambda: unpack_gzip(payload, _VMLINUX_LIMIT_BYTES), None)


def _unpack_xz(payload: bytes) -> bytes:
    return _checked(lambda: unpack_xz(payload[:-_SIZE_BYTES], _VMLINUX_LIMIT_BYTES), payload)


def _unpack_zstd(payload: bytes) -> bytes:
    return _checked(lambda: unpack_zstd(payload[:-_SIZE_BYTES], _VMLINUX_LIMIT_BYTES), payload)


def _unpack_lz4(payload: bytes) -> bytes:
    return _checked(lambda: unpack_lz4(payload[:-_SIZE_BYTES], _VMLINUX_LIMIT_BYTES), payload)


_UNPACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": _unpack_gzip,
    b"\xfd7zXZ\0": _unpack_xz,
    b"\x28\xb5\x2f\xfd": _unpack_zstd,
    LZ4_LEGACY_MAGIC: _unpack_lz4,
}


def _checked(unpack: Callable[[], bytes], sized: bytes | None) -> bytes:
    """What unpack gives, when it is as long as the last four bytes of sized say."""
    expected = struct.unpack("<I", sized[-_SIZE_BYTES:])[0] if sized else None
    if expected is not None and expected > _VMLINUX_LIMIT_BYTES:
        raise BuildError(f"the kernel claims to unpack to {expected} bytes")
    try:
        data = unpack()
    except BuildError as error:
        raise BuildError(f"cannot unpack the kernel: {error.brief}") from error
    if expected is not None and len(data) != expected:
        raise BuildError(f"the kernel unpacks to {len(data)} bytes instead of {expected}")
    return data
