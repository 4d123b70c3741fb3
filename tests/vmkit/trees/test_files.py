"""What is in a kernel's build tree or folder of modules, and what is said of one that cannot be used."""

import gzip
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.trees.trees import MODULES, VERSION, MakeTree, make_bzimage, make_module, write_file
from vmkit.errors import ConfigError, HostError, VmkitError
from vmkit.trees import files as files_module
from vmkit.trees.files import find_installed, find_tree, read_version


@pytest.mark.parametrize("order", ["{}.o", "{}.ko", "kernel/{}.ko"], ids=["6.2", "5.3", "older"])
def test_tree_has_kernel_version_and_modules(make_tree: MakeTree, order: str) -> None:
    tree = make_tree(order=order)
    files = find_tree(tree)
    assert (files.image, files.version, files.vmlinux) == (tree / "arch/x86/boot/bzImage", VERSION, None)
    assert files.modules["vsock"] == ("kernel/net/vmw_vsock/vsock.ko", tree / "net/vmw_vsock/vsock.ko")
    assert len(files.modules) == len(MODULES)
    assert files.builtin_list == b"kernel/drivers/virtio/virtio_pci.ko\n"


def test_vmlinux_is_booted_where_it_can_be(make_tree: MakeTree) -> None:
    tree = make_tree()
    write_file(tree / "vmlinux", b"\x7fELF..." + f"Linux version {VERSION} (me@here)".encode())
    assert (find_tree(tree).image.name, find_tree(tree).vmlinux) == ("bzImage", tree / "vmlinux")
    with (tree / ".config").open("a") as config:
        config.write("CONFIG_PVH=y\n")
    assert find_tree(tree).image == tree / "vmlinux"


def test_tree_without_modules_has_none(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / "modules.order").unlink()
    (tree / "modules.builtin").unlink()
    assert (find_tree(tree).modules, find_tree(tree).builtin_list) == ({}, b"")


def spoil_config(tree: Path) -> None:
    (tree / ".config").unlink()


def make_source(tree: Path) -> None:
    (tree / ".config").unlink()
    (tree / "Kconfig").touch()


def unbuild(tree: Path) -> None:
    (tree / "arch/x86/boot/bzImage").unlink()


def forget_release(tree: Path) -> None:
    (tree / "include/config/kernel.release").unlink()


def make_other(tree: Path) -> None:
    text = (tree / ".config").read_text().replace("Linux/x86", "Linux/arm64")
    (tree / ".config").write_text(text.replace("CONFIG_X86_64=y", "CONFIG_ARM64=y"))


def make_small(tree: Path) -> None:
    text = (tree / ".config").read_text()
    (tree / ".config").write_text(text.replace("CONFIG_X86_64=y", "CONFIG_X86_32=y"))


def build_other(tree: Path) -> None:
    (tree / "arch/x86/boot/bzImage").unlink()
    write_file(tree / "arch/arm64/boot/Image", b"MZ")


def rebuild_half(tree: Path) -> None:
    write_file(tree / "include/config/kernel.release", "6.13.0\n")


def name_badly(tree: Path) -> None:
    write_file(tree / "include/config/kernel.release", "../../etc\n")


@pytest.mark.parametrize(
    ("spoil", "reason", "hint"),
    [
        (shutil.rmtree, "there is no kernel tree", "in which you ran make"),
        (spoil_config, "is no kernel tree: it has no .config", "in which you ran make"),
        (make_source, "is not configured: it has no .config", "make defconfig kvm_guest.config"),
        (unbuild, "is not built: it has no arch/x86/boot/bzImage", "make -j"),
        (forget_release, "is not built", "make -j"),
        (make_other, "is for arm64", "make x86_64_defconfig"),
        (make_small, "is for 32-bit x86", "make x86_64_defconfig"),
        (build_other, "is for arm64", "make x86_64_defconfig"),
        (rebuild_half, f"is {VERSION}, and the modules of .* are for 6.13.0", "build the rest of the tree"),
        (name_badly, "names no version of a kernel: '../../etc'", ""),
    ],
)
def test_tree_that_cannot_be_used_is_named(
    make_tree: MakeTree, spoil: Callable[[Path], object], reason: str, hint: str
) -> None:
    tree = make_tree()
    spoil(tree)
    with pytest.raises(ConfigError, match=reason) as caught:
        find_tree(tree)
    assert hint in caught.value.hint


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What `make modules_install INSTALL_MOD_PATH=` left, one module packed in each way."""
    folder = tmp_path / "lib/modules" / VERSION
    write_file(folder / "kernel/a/one.ko.xz", lzma.compress(make_module("two")))
    write_file(folder / "kernel/a/two.ko.gz", gzip.compress(make_module("")))
    write_file(folder / "extra/three.ko", make_module(""))
    write_file(folder / "modules.builtin", "kernel/net/vmw_vsock/vsock.ko\n")
    (folder / "build").symlink_to("/")
    return folder


def test_modules_are_found_with_modules_dep_and_without(installed: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(make_bzimage())
    plain = find_installed(installed, kernel)
    assert set(plain.modules) == {"one", "two", "three"}
    assert plain.modules["one"] == ("kernel/a/one.ko.xz", installed / "kernel/a/one.ko.xz")
    write_file(installed / "modules.dep", "kernel/a/one.ko.xz: kernel/a/two.ko.gz\n../../../etc/x.ko:\n")
    assert set(find_installed(installed, kernel).modules) == {"one"}
    # The folder above is as good.
    assert find_installed(tmp_path, kernel).version == VERSION


def test_modules_of_another_kernel_are_refused(installed: Path, tmp_path: Path) -> None:
    kernel = tmp_path / "bzImage"
    kernel.write_bytes(make_bzimage("6.1.0-old"))
    for folder in (installed, tmp_path):
        with pytest.raises(ConfigError, match=rf"{kernel} is 6.1.0-old, and the modules of .* are for {VERSION}"):
            find_installed(folder, kernel)
    write_file(tmp_path / "lib/modules/6.2.0/modules.dep", "")
    with pytest.raises(ConfigError, match=r"has no modules of the kernel 6.1.0-old") as caught:
        find_installed(tmp_path, kernel)
    assert VERSION in caught.value.hint
    with pytest.raises(ConfigError, match="is no folder of modules"):
        find_installed(installed / "kernel", kernel)


@pytest.mark.parametrize(
    "content", [b"", b"x", bytes(5000), b"\x7fELF" + b"Linux version %s (x)", make_bzimage()[:0x300]]
)
def test_version_of_what_has_none_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert read_version(tmp_path / "kernel") == ""


def test_file_that_cannot_be_read_is_an_error_of_vmkit(make_tree: MakeTree) -> None:
    tree = make_tree()
    (tree / ".config").unlink()
    (tree / ".config").symlink_to(".config")
    with pytest.raises(VmkitError, match=r"cannot read .*\.config"):
        find_tree(tree)


@pytest.mark.parametrize(
    "name", [".config", "include/config/kernel.release", "modules.order", "modules.builtin", "arch/x86/boot/bzImage"]
)
@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
def test_no_file_of_a_tree_makes_vmkit_wait_or_read_for_ever(make_tree: MakeTree, name: str, kind: str) -> None:
    tree = make_tree()
    (tree / name).unlink()
    if kind == "fifo":
        os.mkfifo(tree / name)
    else:
        (tree / name).symlink_to(kind)
    try:
        assert "vsock" in find_tree(tree).modules or name == "modules.order"
    except VmkitError as error:
        assert error.brief


def test_kernel_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "kernel")
    for kernel in (tmp_path / "kernel", Path("/dev/zero"), tmp_path):
        with pytest.raises(HostError, match=f"cannot read the kernel {kernel}: it is no regular file"):
            read_version(kernel)


def test_kernel_of_terabytes_is_searched_at_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_KERNEL_LIMIT_BYTES", 1 << 20)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF..." + f"Linux version {VERSION} (me@here)".encode())
    os.truncate(kernel, 1 << 40)
    assert read_version(kernel) == VERSION
    kernel.write_bytes(b"")
    os.truncate(kernel, 1 << 40)
    assert read_version(kernel) == ""
