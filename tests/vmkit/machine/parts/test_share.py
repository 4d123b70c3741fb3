"""A folder of the host as the root: who serves it, which image takes it, and what it excludes."""

from pathlib import Path

import pytest

from vmkit.errors import ConfigError, HostError
from vmkit.image.build import BuiltImage
from vmkit.machine.hardware import Hardware
from vmkit.machine.machine import Machine
from vmkit.machine.parts.share import SharePart
from vmkit.machine.parts.system import SystemPart
from vmkit.machine.spec import Accelerator, Backend, MachineSpec

PART = SharePart()


def make_built(*, takes_root: bool = True, modules: tuple[str, ...] = ()) -> BuiltImage:
    path = Path("/i")
    return BuiltImage("any", path, path, path, (), "root", "0", True, takes_root=takes_root, modules_available=modules)


def test_folder_is_served_read_only_by_qemu(tmp_path: Path) -> None:
    spec = MachineSpec(root_from=tmp_path / "a, b")
    hardware = Hardware(spec, "x", 3, tmp_path, Accelerator.TCG, Backend.USER, "qemu", Path("/k"), Path("/i"), (), 7777)
    where = f"path={tmp_path}/a,, b"
    assert PART.plan_argv(hardware) == (
        *("-fsdev", f"local,id=root,{where},security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=vmkit-root"),
    )
    assert PART.plan_record(spec) == {"root_from": str(tmp_path / "a, b")}


def test_services_of_the_host_do_not_run_twice(tmp_path: Path) -> None:
    for init, word in (("auto", "vmkit.init=none"), ("systemd", "vmkit.init=systemd")):
        spec = MachineSpec(root_from=tmp_path, init=init)
        place = ("x", 3, tmp_path, Accelerator.TCG, Backend.USER, "qemu", Path("/k"), Path("/i"), (), 7777)
        assert word in SystemPart().plan_words(Hardware(spec, *place, root_type="9p"))


def test_machine_with_a_folder_is_of_the_image_any() -> None:
    assert Machine(root_from="/").spec.image == "any"
    assert Machine("./mine.toml", root_from="/").spec.image == "./mine.toml"
    with pytest.raises(ConfigError, match="--root-from excludes another root"):
        Machine(root_from="/", root="/disk.img")


def test_folder_that_cannot_be_a_root_is_named(tmp_path: Path) -> None:
    PART.check_host(MachineSpec(root_from=tmp_path))
    (tmp_path / "file").touch()
    for name, reason in (("file", "is not a directory"), ("none", "does not exist")):
        with pytest.raises(HostError, match=f"/{name} as the root: it {reason}"):
            PART.check_host(MachineSpec(root_from=tmp_path / name))


def test_image_and_kernel_must_fit(tmp_path: Path) -> None:
    spec = MachineSpec(root_from=tmp_path)
    with pytest.raises(ConfigError, match="the image any has a root of its own"):
        PART.check_image(spec, make_built(takes_root=False))
    with pytest.raises(ConfigError, match="the kernel of the image any has no 9p") as caught:
        PART.check_image(spec, make_built())
    assert "--tree" in caught.value.hint
    PART.check_image(spec, make_built(modules=("9p", "9pnet_virtio")))
    PART.check_image(MachineSpec(root_from=tmp_path, tree=tmp_path), make_built())
