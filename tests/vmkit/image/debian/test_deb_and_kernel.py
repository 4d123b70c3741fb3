"""Packages become nodes; a kernel package becomes a boot image and the modules that were asked for, in load order."""

import gzip
import io
import lzma
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vmkit.errors import BuildError, CommandError
from vmkit.image.debian.deb import extract_deb, extract_patterns, read_deb
from vmkit.image.formats.elf import has_pvh_entry, read_modinfo, read_needed, read_section
from vmkit.image.formats.lz4 import unpack_lz4
from vmkit.image.formats.tree import FileKind, Tree
from vmkit.image.formats.vmlinux import extract_vmlinux, find_btf
from vmkit.image.kernel import take_kernel

MakeDeb = Callable[..., Path]
MakeElf = Callable[..., bytes]
VERSION = "6.12.1-test"
MODULES = f"usr/lib/modules/{VERSION}"


def test_deb_gives_files_links_and_modes(make_deb: MakeDeb) -> None:
    deb = make_deb("x", {"bin/x": b"1", "etc/y": b"2"}, links={"lib/z.so": "z.so.1"}, executable=("bin/x",))
    nodes = dict(read_deb(deb))
    assert (nodes["usr/bin/x"].mode, nodes["usr/bin/x"].data) == (0o755, b"1")
    assert (nodes["usr/lib/z.so"].kind, nodes["usr/lib/z.so"].data) == (FileKind.SYMLINK, b"z.so.1")
    assert nodes["etc/y"].uid == 0


def test_deb_is_unpacked_without_documentation(make_deb: MakeDeb) -> None:
    tree = Tree()
    extract_deb(
        make_deb("x", {"usr/bin/x": b"", "usr/share/doc/x/copyright": b"", "usr/share/man/man1/x.1": b""}), tree
    )
    assert tree.find("usr/bin/x") is not None
    assert tree.find("usr/share/doc") is None


def test_patterns_take_only_what_matches(make_deb: MakeDeb) -> None:
    tree = Tree()
    extract_patterns(make_deb("x", {"lib/a.so.1.2": b"", "lib/b.so": b""}), tree, ["lib/a.so*"])
    assert tree.find("usr/lib/a.so.1.2") is not None
    assert tree.find("usr/lib/b.so") is None


def test_pattern_without_a_match_is_named(make_deb: MakeDeb) -> None:
    with pytest.raises(BuildError, match="no file that matches 'usr/lib/gone'"):
        extract_patterns(make_deb("x", {"lib/a": b""}), Tree(), ["lib/a", "usr/lib/gone"])


def test_damaged_deb_is_an_error_with_its_command(tmp_path: Path) -> None:
    (tmp_path / "bad.deb").write_bytes(b"!<arch>\nnonsense")
    with pytest.raises(CommandError) as caught:
        list(read_deb(tmp_path / "bad.deb"))
    assert "bad.deb" in caught.value.details


def _pack_deb(path: Path, data_tar: bytes, name: bytes = b"data.tar") -> Path:
    """A package (deb(5)) of any content, which dpkg-deb would not make."""
    control = io.BytesIO()
    with tarfile.open(fileobj=control, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("./control"))
    members = {b"debian-binary": b"2.0\n", b"control.tar.gz": control.getvalue(), name: data_tar}
    packed = b"!<arch>\n"
    for member, data in members.items():
        packed += (
            b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (member, 0, 0, 0, 0o100644, len(data)) + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(packed)
    return path


def _make_tar(name: str, kind: bytes, linkname: str = "", size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, linkname, size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_make_tar("a", tarfile.LNKTYPE, "gone"), "hard link to 'gone'"),
        (_make_tar("a\udcff", tarfile.REGTYPE), "not UTF-8 text"),
        (_make_tar("a", tarfile.REGTYPE, size=3 << 30) + bytes(1 << 20), "holds more than 1024 MiB at 'a'"),
        (_make_tar("a", tarfile.REGTYPE, size=5000), "damaged"),
    ],
)
def test_damaged_content_of_a_deb_names_the_package(tmp_path: Path, content: bytes, message: str) -> None:
    deb = _pack_deb(tmp_path / "bad.deb", content)
    with pytest.raises(BuildError, match=rf"cannot read the package bad\.deb: .*{message}"):
        list(read_deb(deb))


def test_deb_whose_packed_content_is_cut_short_is_an_error_of_dpkg_deb(tmp_path: Path) -> None:
    content = gzip.compress(_make_tar("a", tarfile.REGTYPE, size=200_000) + random.Random(1).randbytes(200_000))
    deb = _pack_deb(tmp_path / "bad.deb", content[:-1000], b"data.tar.gz")
    with pytest.raises(CommandError, match="'dpkg-deb' failed"):
        list(read_deb(deb))


def test_elf_tells_libraries_and_modinfo(make_elf: MakeElf) -> None:
    assert read_needed(make_elf(needed=(b"libc.so.6", b"libm.so.6"))) == ("libc.so.6", "libm.so.6")
    assert read_modinfo(make_elf(modinfo=b"alias=x\0alias=y\0=\0z\0")) == {"alias": ("x", "y"), "": ("",)}
    assert read_modinfo(make_elf(modinfo=b"depends=a,b\0license=GPL\0")) == {"depends": ("a,b",), "license": ("GPL",)}


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 200])
def test_elf_that_is_none_or_damaged_has_no_answers(data: bytes) -> None:
    assert read_needed(data) == ()
    assert read_modinfo(data) == {}
    assert not has_pvh_entry(data)


def _kernel_deb(make_deb: MakeDeb, make_elf: MakeElf) -> Path:
    def module(depends: str) -> bytes:
        return make_elf(modinfo=f"depends={depends}\0".encode())

    files = {
        f"boot/vmlinuz-{VERSION}": b"kernel",
        f"{MODULES}/modules.builtin": b"kernel/drivers/virtio/virtio_pci.ko\n",
        f"{MODULES}/kernel/a.ko.xz": lzma.compress(module("b-c,virtio")),
        f"{MODULES}/kernel/b-c.ko.gz": gzip.compress(module("d")),
        f"{MODULES}/kernel/d.ko": module(""),
        f"{MODULES}/kernel/virtio.ko.xz": lzma.compress(module("")),
        f"{MODULES}/kernel/broken.ko.xz": b"not xz",
        f"{MODULES}/kernel/needy.ko": module("absent"),
        f"{MODULES}/kernel/vsock_loopback.ko": module(""),
    }
    return make_deb("linux-image", files)


def test_kernel_modules_come_with_what_they_need_in_load_order(make_deb: MakeDeb, make_elf: MakeElf) -> None:
    tree = Tree()
    kernel = take_kernel(_kernel_deb(make_deb, make_elf), tree, ("virtio_pci", "virtio", "a"), "vmlinuz")
    assert (kernel.version, kernel.image, kernel.modules) == (VERSION, b"kernel", ("virtio", "d", "b_c", "a"))
    assert tree.glob(f"{MODULES}/*.ko") == [f"{MODULES}/kernel/{name}.ko" for name in ("a", "b-c", "d", "virtio")]
    dep = tree.find(f"{MODULES}/modules.dep")
    assert dep is not None
    assert dep.data.decode().splitlines() == [
        "kernel/virtio.ko:",
        "kernel/d.ko:",
        "kernel/b-c.ko: kernel/d.ko",
        "kernel/a.ko: kernel/b-c.ko kernel/d.ko kernel/virtio.ko",
    ]


def test_available_modules_are_shipped_and_not_loaded_and_barred_ones_unknown_to_modprobe(
    make_deb: MakeDeb, make_elf: MakeElf
) -> None:
    tree = Tree()
    deb = _kernel_deb(make_deb, make_elf)
    kernel = take_kernel(deb, tree, ("d",), "vmlinuz", ("vsock_loopback", "b_c"), ("vsock_loopback",))
    assert kernel.modules == ("d",)
    assert tree.find(f"{MODULES}/kernel/vsock_loopback.ko") is not None
    dep = tree.find(f"{MODULES}/modules.dep")
    assert dep is not None
    assert dep.data.decode().splitlines() == ["kernel/d.ko:", "kernel/b-c.ko: kernel/d.ko"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("gone", f"the kernel {VERSION} has no module 'gone'"),
        ("needy", "has no module 'absent', which needy depends on"),
        ("broken", r"cannot decompress the kernel module .*kernel/broken\.ko\.xz"),
    ],
)
def test_kernel_module_trouble_is_named(make_deb: MakeDeb, make_elf: MakeElf, wanted: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        take_kernel(_kernel_deb(make_deb, make_elf), Tree(), (wanted,), "vmlinuz")


def test_package_without_a_kernel_is_refused(make_deb: MakeDeb) -> None:
    with pytest.raises(BuildError, match="holds 0 kernels"):
        take_kernel(make_deb("x", {"etc/x": b""}), Tree(), (), "vmlinuz")


PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x1000000)


def _bzimage(payload: bytes) -> bytes:
    """Two setup sectors, the header fields of the boot protocol, and a payload 16 bytes behind them."""
    image = bytearray(3 * 512 + 16)
    image[0x1F1] = 2
    image[0x202:0x208] = b"HdrS\x0f\x02"
    struct.pack_into("<II", image, 0x248, 16, len(payload))
    return bytes(image) + payload + b"trailing signature"


def _sized(packed: bytes, vmlinux: bytes) -> bytes:
    return packed + struct.pack("<I", len(vmlinux))


def _lz4(data: bytes, block_bytes: int = 8 << 20) -> bytes:
    """A legacy frame of blocks that hold literals alone (lz4_Block_format.md)."""
    frame = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), block_bytes):
        block = data[at : at + block_bytes]
        rest = len(block) - 15
        packed = b"\xf0" + b"\xff" * (rest // 255) + bytes([rest % 255]) + block
        frame += struct.pack("<I", len(packed)) + packed
    return frame


def test_vmlinux_is_found_in_each_packing(make_elf: MakeElf) -> None:
    vmlinux = make_elf(note=PVH_NOTE)
    assert extract_vmlinux(_bzimage(_sized(_lz4(vmlinux), vmlinux))) == vmlinux
    assert extract_vmlinux(_bzimage(_sized(_lz4(vmlinux, 100), vmlinux))) == vmlinux
    assert extract_vmlinux(_bzimage(gzip.compress(vmlinux))) == vmlinux
    assert extract_vmlinux(_bzimage(_sized(lzma.compress(vmlinux), vmlinux))) == vmlinux


def test_kernel_that_cannot_be_unpacked_is_taken_as_it_is(make_deb: MakeDeb, make_elf: MakeElf) -> None:
    vmlinux = make_elf(note=PVH_NOTE)
    for image, taken in ((_bzimage(gzip.compress(vmlinux)), vmlinux), (b"LZ4 kernel", b"LZ4 kernel")):
        deb = make_deb("linux-image", {f"boot/vmlinuz-{VERSION}": image})
        assert take_kernel(deb, Tree(), (), "auto").image == taken
    with pytest.raises(BuildError) as caught:
        take_kernel(deb, Tree(), (), "vmlinux")
    assert "vmlinuz" in caught.value.hint


def test_lz4_has_a_ceiling() -> None:
    with pytest.raises(BuildError, match="more than 1000 bytes"):
        unpack_lz4(_lz4(bytes(2 * (8 << 20) + 1)), 1000)


def test_btf_of_a_kernel_is_its_section(make_elf: MakeElf) -> None:
    assert find_btf(_bzimage(gzip.compress(make_elf(note=PVH_NOTE)))) == b""
    assert find_btf(make_elf(modinfo=b"x")) == b""
    assert read_section(make_elf(modinfo=b"x"), ".modinfo") == b"x"
    assert find_btf(b"nothing that is packed in a known way") == b""


def test_kernel_that_is_damaged_is_not_taken_as_it_is(make_deb: MakeDeb, make_elf: MakeElf) -> None:
    vmlinux = make_elf(note=PVH_NOTE)
    deb = make_deb("linux-image", {f"boot/vmlinuz-{VERSION}": _bzimage(_sized(lzma.compress(vmlinux)[:-20], vmlinux))})
    with pytest.raises(BuildError, match="cannot unpack the kernel"):
        take_kernel(deb, Tree(), (), "auto")


def test_vmlinux_trouble_is_told(make_elf: MakeElf) -> None:
    pvh, plain = make_elf(note=PVH_NOTE), make_elf()
    cases = {
        "no PVH entry": _bzimage(gzip.compress(plain)),
        "not a bzImage": b"MZ" + bytes(2000),
        "does not know how this kernel is packed": _bzimage(b"LZ00" + bytes(100)),
        "ends inside its payload": _bzimage(gzip.compress(pvh))[:-60],
        "instead of": _bzimage(lzma.compress(pvh) + bytes(4)),
        "cannot unpack the kernel": _bzimage(_sized(lzma.compress(pvh)[:-20], pvh)),
        "broken, or cut short": _bzimage(_sized(_lz4(pvh)[:-20], pvh)),
        "broken": _bzimage(_sized(b"\x02\x21\x4c\x18" + struct.pack("<I", 4) + b"\xf0\xff\xff\xff", pvh)),
        "inside a block's size": _bzimage(_sized(_lz4(pvh) + b"\x01", pvh)),
    }
    for message, image in cases.items():
        with pytest.raises(BuildError, match=message):
            extract_vmlinux(image)
