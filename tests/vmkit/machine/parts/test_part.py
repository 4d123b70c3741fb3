"""What travels to the monitor for a part."""

import json
from dataclasses import MISSING, asdict, fields

import pytest

from vmkit.machine.parts.part import Companion, Fitting, KnownEnd, QmpCommand, ServedSocket, parse_fitting

COMMAND = QmpCommand("device_add", {"driver": "toy", "id": "toy0"})
COMPANION = Companion(("toy", "--fd", "3"), "toy device", "toy", "toy.log", "toy0", (COMMAND,), "toy.sock", "toy.ctl")
FULL = Fitting(
    "toy",
    sockets=(ServedSocket("char", "toy.chr"),),
    plug=(COMMAND,),
    fd_name="toy-fd",
    companion=COMPANION,
    ready_socket="toy.ready",
    ends=(KnownEnd("pattern", "reason", "brief", "hint"),),
    device="toy1",
    ports=("toy-port",),
)


@pytest.mark.parametrize("fitting", [FULL, Fitting("toy")])
def test_fitting_arrives_whole(fitting: Fitting) -> None:
    assert parse_fitting(json.loads(json.dumps(asdict(fitting)))) == fitting


def test_fitting_above_has_every_field() -> None:
    for field in fields(Fitting):
        assert field.default is MISSING or getattr(FULL, field.name) != field.default, field.name
