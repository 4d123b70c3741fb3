"""The least memory that a kernel and an initramfs boot in, from files of known sizes."""

import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.machine.memory import MIB, SYSTEM_MIB, check_guest_memory, find_needed_mib

LITTLE_MIB, PLENTY_MIB = 64, 4096
CPIO = b"070701"

Write = Callable[[bytes, int], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(head: bytes, size: int) -> Path:
        """A file that begins so; the rest of it is a hole."""
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
        return path

    return make


def make_vmlinux(start: int, sizes: list[int]) -> bytes:
    """The head of an ELF file whose segments follow each other in memory."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(sizes), 0, 0, 0
    )
    for size in sizes:
        header += struct.pack("<IIQQQQQQ", 1, 7, 4096, 0, start, 4096, size, 4096)
        start += size
    return header


def make_bzimage(memory: int) -> bytes:
    head = bytearray(4096)
    head[0x202:0x206] = b"HdrS"
    head[0x260:0x264] = memory.to_bytes(4, "little")
    return bytes(head)


KERNELS = [make_vmlinux(16 * MIB, [20 * MIB, 12 * MIB]), make_bzimage(32 * MIB)]


@pytest.mark.parametrize("kernel", KERNELS, ids=["vmlinux", "bzimage"])
def test_initramfs_needs_its_place_and_a_root_of_twice_its_size(write: Write, kernel: bytes) -> None:
    # 32 of the kernel, 3 times 32 of the initramfs, and a 32nd part of the sum.
    assert find_needed_mib(LITTLE_MIB, write(kernel, 8192), write(CPIO, 32 * MIB)) == 132


@pytest.mark.parametrize("kernel", KERNELS, ids=["vmlinux", "bzimage"])
def test_root_on_a_disk_needs_memory_for_the_system(write: Write, kernel: bytes) -> None:
    assert find_needed_mib(LITTLE_MIB, write(kernel, 8192), write(CPIO, MIB)) == 32 + SYSTEM_MIB


def test_packed_initramfs_is_unpacked_where_it_matters(write: Write) -> None:
    kernel = write(make_bzimage(32 * MIB), 8192)
    # 8 MiB that cannot be packed, and 32 that take next to nothing.
    packed = gzip.compress(random.Random(1).randbytes(8 * MIB) + bytes(32 * MIB), 1)
    initrd = write(packed, len(packed))
    # 32 and 8 and twice 40, and a 32nd part of the sum.
    assert 124 <= find_needed_mib(LITTLE_MIB, kernel, initrd) <= 125
    assert find_needed_mib(PLENTY_MIB, kernel, initrd) < 64


def test_packed_initramfs_that_is_damaged_is_taken_as_it_is(write: Write) -> None:
    assert (
        find_needed_mib(LITTLE_MIB, write(make_bzimage(32 * MIB), 8192), write(b"\x1f\x8bxx", MIB)) == 32 + SYSTEM_MIB
    )


@pytest.mark.parametrize("head", [b"", b"\x7fELF\x02\x01", make_vmlinux(0, [])[:50], b"HdrS"])
def test_kernel_of_an_unknown_size_counts_for_nothing(write: Write, head: bytes) -> None:
    assert find_needed_mib(LITTLE_MIB, write(head, len(head)), write(CPIO, MIB)) == SYSTEM_MIB


def test_too_little_memory_is_refused_with_the_least_that_is_enough(write: Write, tmp_path: Path) -> None:
    kernel, initrd = write(make_bzimage(32 * MIB), 8192), write(CPIO, 32 * MIB)
    check_guest_memory(132, kernel, initrd)
    with pytest.raises(ConfigError, match="for this kernel and initramfs, not 131") as caught:
        check_guest_memory(131, kernel, initrd)
    assert caught.value.hint == "at least 132"
    check_guest_memory(LITTLE_MIB, tmp_path / "nothing", initrd)
