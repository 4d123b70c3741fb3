"""Disks and gdb's port: what is refused before QEMU is started, and what QEMU is given."""

import json
import os
import socket
from pathlib import Path

import pytest

from tests.vmkit.machine.conftest import Boot
from tests.vmkit.roots.disks import make_file_system
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import stop
from vmkit.machine.parts.disk import check_disk, check_root
from vmkit.machine.parts.gdb import check_gdb_port
from vmkit.machine.probe import is_emulated
from vmkit.machine.spec import DiskMode, DiskSpec, MachineSpec
from vsh.registry import find_machine, read_machines


def test_disk_is_a_file_that_can_be_opened(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(bytes(1024))
    check_disk(DiskSpec(tmp_path / "good", DiskMode.READ_WRITE))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in (("fifo", "neither a file"), ("gone", "No such file"), ("loop", "Too many levels")):
        with pytest.raises(HostError, match=words):
            check_disk(DiskSpec(tmp_path / name))


def test_kind_of_a_disk_is_told_by_its_name_and_never_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.img").write_bytes(b"QFI\xfb" + bytes(1000))
    (tmp_path / "b.qcow2").write_bytes(bytes(1000))
    with pytest.raises(HostError, match=r"is a qcow2 image, and its name does not end in \.qcow2"):
        check_disk(DiskSpec(tmp_path / "a.img"))
    with pytest.raises(HostError, match=r"is named \.qcow2, but is not a qcow2 image"):
        check_disk(DiskSpec(tmp_path / "b.qcow2"))
    check_disk(DiskSpec((tmp_path / "a.img").rename(tmp_path / "c.qcow2")))


def test_root_is_a_file_system(tmp_path: Path) -> None:
    check_root(make_file_system("ext4", tmp_path / "root"))
    (tmp_path / "other").write_bytes(bytes(4096))
    with pytest.raises(ConfigError, match=r"vmkit cannot tell what .*other is"):
        check_root(tmp_path / "other")


def test_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=rf"QEMU cannot serve gdb on port {port}: Address already in use"):
            check_gdb_port(port)
    check_gdb_port(port)


def test_qemu_is_given_disks_port_and_network(boot: Boot, image: BuiltImage, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(512))
    disks = (DiskSpec(tmp_path / "d"), DiskSpec(tmp_path / "d"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = boot("ready", disks=disks, gdb_port=port, cpu="qemu64", netdev="user")
    argv = (started.directory / "argv.txt").read_text()
    assert f"-gdb tcp:127.0.0.1:{port}" in argv
    assert "-cpu qemu64" in argv
    assert "-netdev user,id=net0" in argv
    assert argv.splitlines()[0].count("virtio-blk-pci") == 2
    (machine,) = read_machines()
    assert machine.record["gdb_port"] == port
    assert json.dumps(machine.record["disks"]).count(str(tmp_path / "d")) == 2


def test_disk_that_another_machine_has_is_named(boot: Boot, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(512))
    with pytest.raises(MachineError, match=r"'tiny' did not start: the disk .*/d is in use by another machine"):
        boot("disk-in-use", disks=(DiskSpec(tmp_path / "d", DiskMode.READ_WRITE),))
    assert read_machines() == []


def test_root_of_an_image_that_has_none_cannot_be_replaced(boot: Boot, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the image tiny has its root in memory"):
        boot("ready", root=make_file_system("ext4", tmp_path / "root"))
    assert read_machines() == []


@pytest.mark.parametrize(
    ("text", "emulated"),
    [
        ("processor\t: 0\nmodel name\t: QEMU TCG CPU version 2.5+\n", True),
        ("model name\t: QEMU Virtual CPU version 2.5+\n", True),
        ("model name\t: Intel(R) Xeon(R)\n", False),
        ("", False),
    ],
)
def test_host_that_is_emulated_says_so(tmp_path: Path, text: str, emulated: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert is_emulated(tmp_path / "cpuinfo") is emulated
    assert not is_emulated(tmp_path / "gone")


def test_socket_for_gdb_is_its_owners_and_qemus(boot: Boot) -> None:
    started = boot("ready", gdb=True)
    machine = find_machine(name="tiny")
    assert machine is not None
    path = started.directory / "gdb.sock"
    assert started.gdb == machine.record["gdb"] == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as gdb:
        # QEMU has the listening socket; the fake one does not accept.
        gdb.connect(str(path))
    stop.kill(machine)
    assert not path.exists()


def test_gdb_on_a_socket_and_a_port_is_refused() -> None:
    with pytest.raises(ConfigError, match="on a socket or on a port"):
        MachineSpec(gdb=True, gdb_port=1234)
