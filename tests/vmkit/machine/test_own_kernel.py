"""A machine whose kernel is its user's: which options exclude each other, and what is found before QEMU starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.machine.conftest import Boot
from tests.vmkit.trees.trees import VERSION, build_tree
from vmkit.errors import ConfigError
from vmkit.image.build import BuiltImage
from vmkit.image.formats.cpio import read_cpio
from vmkit.machine.own_kernel import fit_initrd, read_kernel
from vmkit.machine.spec import Backend, DiskSpec, MachineSpec


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tree": Path("/t"), "kernel": Path("/k")}, "--tree excludes --kernel"),
        ({"tree": Path("/t"), "modules": Path("/m")}, "--tree excludes --modules"),
        ({"modules": Path("/m")}, "--modules needs the kernel"),
        ({"tree": Path("/t"), "architecture": "arm64"}, "--tree and --modules are for machines of amd64, and this one"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        MachineSpec(**options)


def test_kernel_of_a_tree_is_started_with_its_modules(boot: Boot, image: BuiltImage, tmp_path: Path) -> None:
    tree = build_tree(tmp_path / "my, linux")
    image.initrd.write_bytes(b"")
    started = boot("ready", tree=tree)
    assert started.choices.kernel == tree / "arch/x86/boot/bzImage"
    names = {Path(entry.path).name for entry in read_cpio(started.choices.initrd.read_bytes())}
    assert {"vsock.ko", "modules.dep", "modules.builtin"} <= names
    assert "virtio_blk.ko" not in names
    argv = (started.directory / "argv.txt").read_text()
    assert str(started.choices.initrd) in argv


def test_machine_decides_what_the_kernel_must_have(image: BuiltImage, tmp_path: Path) -> None:
    tree = build_tree(tmp_path / "linux", without=("EXT4_FS",))
    spec = MachineSpec(tree=tree)
    files = read_kernel(spec)
    assert files is not None
    assert files.version == VERSION
    # A token comes in the firmware's tables.
    with pytest.raises(ConfigError, match=r"needs: CONFIG_DMI$"):
        read_kernel(replace(spec, token=True))
    with pytest.raises(ConfigError, match=r"needs: CONFIG_DMI$"):
        fit_initrd(spec, files, image, "", Backend.VHOST)
    with pytest.raises(ConfigError, match=r"needs: CONFIG_EXT4_FS$"):
        fit_initrd(spec, files, replace(image, root=tmp_path), "", Backend.USER)
    with_disk = fit_initrd(replace(spec, disks=(DiskSpec(tmp_path),)), files, image, "", Backend.USER)
    assert any(entry.path.endswith("virtio_blk.ko") for entry in read_cpio(with_disk.read_bytes()))


def test_machine_without_a_tree_needs_no_kernel_of_its_user() -> None:
    assert read_kernel(MachineSpec()) is None
