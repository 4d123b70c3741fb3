"""The Python API: the with-block, what may be asked when, and that it ends its own machine and no other."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import vmkit
from vmkit.errors import ConfigError, MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import machine as machine_module
from vmkit.machine import stop
from vmkit.machine.spec import Accelerator, Backend
from vmkit.machine.start import start_machine
from vsh.errors import VshError
from vsh.registry import find_machine, read_machines


@pytest.fixture
def machine(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> vmkit.Machine:
    """A machine that is not started, whose QEMU says READY."""
    build = partial(start_machine, build=lambda _image, _tell: image)
    monkeypatch.setattr(machine_module, "start_machine", build)
    return vmkit.Machine("tiny", accelerator="tcg", backend="user", append="fake=ready")


def test_arguments_become_a_spec() -> None:
    spec = vmkit.Machine(
        "mine", name="m", cid=9, memory="1G", cpus=2, accelerator="auto", backend="vhost", kernel="/k", append="x"
    ).spec
    assert (spec.image, spec.name, spec.cid, spec.memory_mib, spec.cpus) == ("mine", "m", 9, 1024, 2)
    assert (spec.accelerator, spec.backend, spec.kernel, spec.append) == (None, Backend.VHOST, Path("/k"), "x")
    spec = vmkit.Machine(root="/r", disks=["/a"], rwdisks=["/b"], gdb_port=1234, cpu="qemu64,-cx16", netdev="user").spec
    assert (spec.root, spec.gdb_port, spec.cpu, spec.netdev) == (Path("/r"), 1234, "qemu64,-cx16", "user")
    assert [(disk.path, disk.mode.value) for disk in spec.disks] == [(Path("/a"), "ro"), (Path("/b"), "rw")]
    assert vmkit.Machine(accelerator="kvm", memory=512).spec.accelerator is Accelerator.KVM


def test_relative_paths_are_those_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU runs in the machine's directory."""
    monkeypatch.chdir(tmp_path)
    spec = vmkit.Machine(kernel="bzImage", root="r.img", disks=["a.img"], rwdisks=["b.img"]).spec
    assert (spec.kernel, spec.root) == (tmp_path / "bzImage", tmp_path / "r.img")
    assert [disk.path for disk in spec.disks] == [tmp_path / "a.img", tmp_path / "b.img"]
    spec = vmkit.MachineSpec(kernel=Path("k"), root=Path("r"), disks=(vmkit.Disk(Path("d")),))
    assert (spec.kernel, spec.root, spec.disks[0].path) == (tmp_path / "k", tmp_path / "r", tmp_path / "d")


@pytest.mark.parametrize("field", [{"memory": "x"}, {"cid": 1}, {"name": ".."}, {"accelerator": "warp"}])
def test_wrong_arguments_are_refused_before_anything_starts(field: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValueError)):
        vmkit.Machine(**field)


def test_block_is_the_machines_life(machine: vmkit.Machine, folders: Path) -> None:
    with machine as running:
        assert running is machine
        assert (machine.name, machine.cid) == ("tiny", 3)
        assert machine.directory == folders / "runtime" / "machines" / "tiny"
        assert machine.started.choices.accelerator is Accelerator.TCG
        assert find_machine(name="tiny") is not None
    assert read_machines() == []


def test_block_that_fails_ends_its_machine(machine: vmkit.Machine) -> None:
    with pytest.raises(KeyError), machine:
        raise KeyError
    assert read_machines() == []


@pytest.mark.parametrize("what", ["name", "cid", "directory", "started"])
def test_asking_before_the_start_says_what_is_missing(machine: vmkit.Machine, what: str) -> None:
    with pytest.raises(MachineError, match="the machine is not started") as caught:
        getattr(machine, what)
    assert caught.value.hint == "use it in a with-block, or call start()"


def test_kill_before_the_start_is_nothing_and_down_is_an_error(machine: vmkit.Machine) -> None:
    machine.kill()
    with pytest.raises(MachineError, match="not started"):
        machine.down()
    with pytest.raises(MachineError, match="not started"):
        machine.run(["true"])


def test_second_start_is_refused_and_the_first_goes_on(machine: vmkit.Machine) -> None:
    with machine:
        with pytest.raises(MachineError, match="'tiny' was started already"):
            machine.start()
        assert find_machine(name="tiny") is not None


def test_machine_that_has_ended_says_where_to_look(machine: vmkit.Machine) -> None:
    with machine:
        os.kill(machine.started.monitor.pid, signal.SIGKILL)
        machine.started.monitor.wait(10)
        with pytest.raises(MachineError, match="'tiny' is not running any more") as caught:
            machine.run(["true"])
        assert caught.value.hint == "see why: vmkit logs tiny"


def test_later_machine_of_the_same_name_is_not_ours_to_end(machine: vmkit.Machine) -> None:
    second = vmkit.Machine("tiny", name="tiny", accelerator="tcg", backend="user", append="fake=ready")
    with machine:
        os.kill(machine.started.monitor.pid, signal.SIGTERM)
        machine.started.monitor.wait(10)
        second.start()
        with pytest.raises(MachineError, match="not running any more"):
            machine.connect()
    assert find_machine(name="tiny") is not None
    second.kill()
    assert read_machines() == []


def test_down_asks_and_then_insists(machine: vmkit.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "power_off", partial(stop.power_off, timeout_s=0.1))
    machine.start()
    machine.down()
    assert read_machines() == []
    machine.start()
    machine.kill()
    machine.kill()


def test_guest_without_an_answer_is_an_error_that_ends(machine: vmkit.Machine) -> None:
    """The fake has no vshd: the device takes the call and nobody answers."""
    with machine, pytest.raises(VshError):
        machine.run(["true"], timeout=0.2)


def test_package_names_what_it_has_not() -> None:
    with pytest.raises(AttributeError, match="module 'vmkit' has no attribute 'Nothing'"):
        vmkit.Nothing  # noqa: B018
