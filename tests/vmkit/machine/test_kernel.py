"""A file that is no kernel is called by its name before QEMU is asked; one that QEMU boots passes."""

import gzip
import itertools
import lzma
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.machine.kernel import check_kernel


def make_bzimage() -> bytes:
    image = bytearray(3000)
    image[0x202:0x206] = b"HdrS"
    return bytes(image)


def make_elf(*, machine: int = 62, notes: bytes = b"", bits: int = 2, notes_at: int = 120) -> bytes:
    """An ELF file (elf.h) with one program header, of notes."""
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 4, 0, notes_at, 0, 0, len(notes), len(notes), 4) + notes


PVH = struct.pack("<III", 4, 4, 6) + b"Xen\0aaaa" + struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)


ARM64 = b"MZ" + bytes(54) + b"ARM\x64" + bytes(100)
RISCV64 = b"MZ" + bytes(46) + b"RISCV" + bytes(100)
S390X = bytes(0x10008) + b"S390EP" + bytes(100)
KERNELS = {"amd64": make_bzimage(), "arm64": ARM64, "riscv64": RISCV64, "s390x": S390X}


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        (tmp_path / "kernel").write_bytes(content)
        return tmp_path / "kernel"

    return write


@pytest.mark.parametrize(
    "content", [make_bzimage(), make_elf(notes=PVH), b"\x7fELF" + bytes(996) + struct.pack("<I", 0x1BADB002)]
)
def test_what_qemu_boots_passes(kernel: Callable[[bytes], Path], content: bytes) -> None:
    check_kernel(kernel(content))


@pytest.mark.parametrize(
    ("content", "what", "hint"),
    [
        (b"", "empty", "give a bzImage"),
        (gzip.compress(make_bzimage(), mtime=0), "gzip data", "unpack it first: zcat"),
        (lzma.compress(b"x"), "xz data", "xzcat"),
        (b"\x93random" + b"\1" * 5000, "of an unknown format", "give a bzImage"),
        (b"x", "of an unknown format", "give a bzImage"),
        (b"#!/bin/sh\n", "a script", "give a bzImage"),
        (b"!<arch>\ndebian-binary   0", "a Debian package", "dpkg-deb -x"),
        (b"070701" + b"0" * 200, r"an initramfs \(cpio\)", "give a bzImage"),
        (bytes(0x438) + b"\x53\xef" + bytes(100), "an ext4 file system", "--root"),
        (ARM64, "a kernel for arm64", "--arch arm64"),
        (RISCV64, "a kernel for riscv64", "--arch riscv64"),
        (S390X, "a kernel for s390x", "--arch s390x"),
        (b"MZ" + bytes(2000), "an EFI program without", "bzImage"),
        (make_elf(), "an ELF file without a PVH entry", "CONFIG_PVH"),
        (make_elf(notes=PVH[:30]), "an ELF file without a PVH entry", "CONFIG_PVH"),
        (make_elf(notes=PVH, notes_at=2**64 - 1), "an ELF file without a PVH entry", "CONFIG_PVH"),
        (make_elf(notes=PVH, machine=183), "an ELF file for arm64", "--arch arm64"),
        (make_elf(notes=PVH, machine=21), "an ELF file of another processor", "give a bzImage"),
        (make_elf(bits=1), "an ELF file that is not of 64 bits", "give a bzImage"),
        (b"\x7fELF\x02\x01", "an ELF file that is not of 64 bits", "give a bzImage"),
    ],
    # Bytes make long names, and a name must be the same in every process of a run.
    ids=itertools.count(),
)
def test_what_is_no_kernel_is_named(kernel: Callable[[bytes], Path], content: bytes, what: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"kernel is not a kernel that QEMU can boot: it is {what}") as caught:
        check_kernel(kernel(content))
    assert hint in caught.value.hint


@pytest.mark.parametrize("machine", KERNELS)
@pytest.mark.parametrize("made_for", KERNELS)
def test_kernel_is_of_the_machines_architecture(kernel: Callable[[bytes], Path], machine: str, made_for: str) -> None:
    path = kernel(KERNELS[made_for])
    if made_for == machine:
        check_kernel(path, machine)
        return
    with pytest.raises(ConfigError, match=f"it is a kernel for {made_for}") as caught:
        check_kernel(path, machine)
    assert caught.value.hint == f"the machine is {machine}; for one of {made_for}: --arch {made_for}"


@pytest.mark.parametrize("machine", ["arm64", "riscv64", "s390x"])
def test_what_is_no_kernel_of_another_architecture_is_named(kernel: Callable[[bytes], Path], machine: str) -> None:
    for content, what in ((b"", "empty"), (b"#!/bin/sh", "a script"), (gzip.compress(b"x"), "gzip data")):
        with pytest.raises(ConfigError, match=f"it is {what}") as caught:
            check_kernel(kernel(content), machine)
        assert "x86" not in caught.value.hint


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="it is not a regular file"):
        check_kernel(tmp_path / "fifo")


def test_file_that_cannot_be_read_is_an_error_of_the_host(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(HostError, match=f"cannot read the kernel {path}: {reason}") as caught:
            check_kernel(path)
        assert caught.value.hint == ""
