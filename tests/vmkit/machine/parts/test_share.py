"""A folder of the host as the root: who serves it, which image takes it, and what it excludes."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest

from tests.vmkit.machine.test_virtiofsd import install
from vmkit.errors import ConfigError, HostError
from vmkit.image.build import BuiltImage
from vmkit.machine.hardware import Hardware
from vmkit.machine.live_root import choose_live_root
from vmkit.machine.machine import Machine
from vmkit.machine.parts.part import parse_fitting
from vmkit.machine.parts.share import SharePart, plan_virtiofsd
from vmkit.machine.parts.system import SystemPart
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.virtiofsd import Virtiofsd, plan_view

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
    assert PART.plan_fitting(hardware) is None


def test_folder_is_served_read_only_by_virtiofsd(tmp_path: Path) -> None:
    spec = MachineSpec(root_from=tmp_path / "a, b")
    place = ("x", 3, tmp_path, Accelerator.TCG, Backend.USER, "qemu", Path("/k"), Path("/i"), (), 7777)
    hardware = Hardware(spec, *place, root_type="virtiofs", virtiofsd=Virtiofsd("/v", 5000))
    assert PART.plan_argv(hardware) == ("-device", "pcie-root-port,id=root-port,slot=2")
    fitting = PART.plan_fitting(hardware)
    assert fitting is not None and fitting.companion is not None
    words = fitting.companion.argv
    assert words[:6] == ("/v", "--fd", "{frontend}", "--shared-dir", f"{tmp_path}/a, b", "--readonly")
    assert words[words.index("--rlimit-nofile") + 1] == "5000"
    assert fitting.companion.is_vital
    assert [command.name for command in fitting.plug] == ["chardev-add", "device_add"]
    assert fitting.plug[1].arguments["tag"] == "vmkit-root"
    assert parse_fitting(json.loads(json.dumps(asdict(fitting)))) == fitting


def test_root_of_the_host_is_served_at_the_machines_directory(tmp_path: Path) -> None:
    """virtiofsd cannot make its root of / itself. An announced mount point would be closed to the guest's overlay."""
    place = ("x", 3, tmp_path / "m", Accelerator.TCG, Backend.USER, "qemu", Path("/k"), Path("/i"), (), 7777)
    for folder, shared in (("/", tmp_path / "m"), (str(tmp_path), tmp_path)):
        spec = MachineSpec(root_from=Path(folder))
        hardware = Hardware(spec, *place, root_type="virtiofs", virtiofsd=Virtiofsd("/v", 5000))
        words = plan_virtiofsd(hardware, Path(folder)).argv
        view, served = words[: words.index("/v")], words[words.index("/v") :]
        assert served[:5] == ("/v", "--fd", "{frontend}", "--shared-dir", str(shared))
        assert {"--readonly", "--no-announce-submounts"} <= set(served)
        assert view == (plan_view(tmp_path / "m", ()) if folder == "/" else ())


def test_user_sees_the_files_of_others_as_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its namespace virtiofsd sees the owner 65534, and sudo and sshd of the guest would refuse such files."""
    spec = MachineSpec(root_from=tmp_path)
    place = ("x", 3, tmp_path, Accelerator.TCG, Backend.USER, "qemu", Path("/k"), Path("/i"), (), 7777)
    hardware = Hardware(spec, *place, root_type="virtiofs", virtiofsd=Virtiofsd("/v", 5000))
    for user, is_told in ((1000, True), (0, False)):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        words = plan_virtiofsd(hardware, tmp_path).argv
        assert (("--translate-uid", "host:65534:0:1") in pairwise(words)) is is_told


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


def test_image_and_kernel_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MachineSpec(root_from=tmp_path)
    with pytest.raises(ConfigError, match="the image any has a root of its own"):
        PART.check_image(spec, make_built(takes_root=False))
    install(monkeypatch, tmp_path, "exit 3")
    with pytest.raises(ConfigError, match=r"cannot serve .* here, and the kernel of the image \w+ has no 9p") as caught:
        PART.check_image(spec, make_built())
    assert "--tree" in caught.value.hint
    assert "/virtiofsd does not run" in caught.value.details
    PART.check_image(spec, make_built(modules=("9p", "9pnet_virtio")))
    PART.check_image(MachineSpec(root_from=tmp_path, tree=tmp_path), make_built())


def test_way_is_virtiofs_where_host_and_kernel_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MachineSpec(root_from=tmp_path / "root")
    (tmp_path / "root").mkdir()
    install(monkeypatch, tmp_path)
    found = choose_live_root(spec, ("virtiofs", "9p"))
    assert (found.way, found.reason) == ("virtiofs", "")
    assert found.virtiofsd is not None and found.virtiofsd.program == str(tmp_path / "virtiofsd")
    found = choose_live_root(spec, ("9p",))
    assert (found.way, found.reason) == ("9p", "vmkit knows of no driver in this kernel")
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    other = MachineSpec(root_from=tmp_path)
    assert (
        choose_live_root(other, ("virtiofs", "9p")).reason == "this host gives virtiofsd no namespaces for its sandbox"
    )
