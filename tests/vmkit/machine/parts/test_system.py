"""The init of a root of a user's own: what the guest is told, and which options cannot be."""

from pathlib import Path
from typing import Any

import pytest

import vmkit
from tests.vmkit.machine.test_source import make_built
from vmkit.errors import ConfigError
from vmkit.machine.hardware import Hardware
from vmkit.machine.parts.system import SystemPart
from vmkit.machine.spec import Accelerator, Backend, MachineSpec


def make_hardware(root_type: str = "ext4", **options: Any) -> Hardware:
    place = Path("/m")
    return Hardware(
        MachineSpec(image="any", root=Path("/r"), **options),
        *("m", 3, place, Accelerator.TCG, Backend.USER, "qemu", place, place, (), 7777),
        root_type=root_type,
    )


def test_systemd_waits_for_nothing_that_the_machine_lacks() -> None:
    words = SystemPart().plan_words(make_hardware())
    assert words[:3] == ("fstab=no", "systemd.firstboot=no", "cloud-init=disabled")
    assert "systemd.mask=systemd-networkd-wait-online.service" in words
    assert "systemd.mask=systemd-remount-fs.service" in words
    # Who has the file read has all of it.
    own = SystemPart().plan_words(make_hardware(append="x fstab=yes"))
    assert not [word for word in own if "remount" in word]
    assert not [word for word in words if word.startswith("vmkit.init=")]
    assert not [word for word in SystemPart().plan_words(make_hardware(netdev="user")) if "wait-online" in word]


def test_init_that_is_wanted_is_told_to_the_guest() -> None:
    assert SystemPart().plan_words(make_hardware(init="systemd"))[0] == "vmkit.init=systemd"
    assert SystemPart().plan_words(make_hardware(init="none")) == ("vmkit.init=none",)
    assert SystemPart().plan_words(make_hardware("")) == ()


def test_init_is_for_a_root_of_the_users(tmp_path: Path) -> None:
    part = SystemPart()
    for word in ("systemd", "none"):
        with pytest.raises(ConfigError, match="the image tiny has an init of its own"):
            part.check_image(MachineSpec(init=word), make_built(tmp_path, name="tiny"))
        part.check_image(MachineSpec(init=word), make_built(tmp_path, takes_root=True))
    part.check_image(MachineSpec(), make_built(tmp_path, name="tiny"))
    with pytest.raises(ConfigError, match="--init must be one of auto, systemd, none, not 'openrc'"):
        vmkit.Machine("any", init="openrc")
