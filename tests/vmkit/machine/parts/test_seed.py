"""User-data for cloud-init: the disk that a machine gets, and files that cloud-init would ignore."""

import json
import stat
from pathlib import Path

import pytest

import vmkit
from tests.vmkit.image.formats.test_iso9660 import read_files
from tests.vmkit.machine.parts.test_system import make_hardware
from tests.vmkit.machine.test_source import make_built
from vmkit.errors import ConfigError, HostError
from vmkit.machine.parts.seed import MAX_BYTES, SeedPart, make_seed, read_user_data
from vmkit.machine.parts.system import SystemPart
from vmkit.machine.spec import MachineSpec

CONFIG = b"#cloud-config\nruncmd: [[touch, /done]]\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "user data.yaml"
    path.write_bytes(CONFIG)
    return path


def test_seed_has_the_file_and_names_the_machine(config: Path, tmp_path: Path) -> None:
    make_seed(MachineSpec(user_data=config), "my_vm", tmp_path)
    seed = tmp_path / "seed.iso"
    assert stat.S_IMODE(seed.stat().st_mode) == 0o600
    files = read_files(seed.read_bytes())
    assert files["user-data"] == CONFIG
    meta_data = json.loads(files["meta-data"])
    assert meta_data["local-hostname"] == "my-vm"
    assert meta_data["instance-id"].startswith("my_vm-")


def test_guest_has_the_disk_and_looks_at_no_other_source(config: Path) -> None:
    hardware = make_hardware(user_data=config)
    words = SeedPart().plan_argv(hardware)
    assert "file.filename=/m/seed.iso" in words[1]
    assert "read-only=on" in words[1]
    assert words[3].endswith("serial=vmkit-seed")
    assert SeedPart().plan_words(hardware) == ("vmkit.seed", "ds=nocloud")
    assert "cloud-init=disabled" not in SystemPart().plan_words(hardware)


def test_machine_without_user_data_has_nothing_of_it(tmp_path: Path) -> None:
    part, hardware = SeedPart(), make_hardware()
    assert (part.plan_argv(hardware), part.plan_words(hardware)) == ((), ())
    make_seed(hardware.spec, "m", tmp_path)
    assert not list(tmp_path.iterdir())


def test_file_that_cloud_init_would_ignore_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with pytest.raises(HostError, match=r"cannot use the user-data .*: No such file or directory"):
        read_user_data(path)
    for content in (b"", b"users: [ann]\n", b"\n#cloud-config\n"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="it begins with no mark of its kind") as caught:
            read_user_data(path)
        assert "#cloud-config" in caught.value.hint
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="has more than 1048576 bytes"):
        read_user_data(path)
    path.write_bytes(b"#!/bin/sh\n")
    assert read_user_data(path) == b"#!/bin/sh\n"


def test_user_data_is_for_a_root_with_an_init(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init none starts no cloud-init"):
        vmkit.Machine("any", user_data=config, init="none")
    with pytest.raises(ConfigError, match="a root of --root-from has vmkit's init"):
        vmkit.Machine("any", user_data=config, root_from="/")
    with pytest.raises(ConfigError, match="the image tiny has no cloud-init"):
        SeedPart().check_image(MachineSpec(user_data=config), make_built(tmp_path, name="tiny"))
    SeedPart().check_image(MachineSpec(user_data=config), make_built(tmp_path, takes_root=True))
