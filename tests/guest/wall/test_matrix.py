"""The guest's own users and its root against every set of layers: each attempt ends as the table says."""

from pathlib import Path

import pytest

from tests.guest.wall import expected
from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import (
    ALL,
    CID,
    NONE,
    RECORDS,
    USER_READY_PORT,
    Outcome,
    Scene,
    attack,
    open_scene,
    plan_scenes,
    read_outcomes,
)
from vmkit.machine.machine import Machine

WHO = ("user", "namespace", "root")


@pytest.mark.parametrize("scene", plan_scenes("user"), ids=str)
def test_every_attempt_ends_as_the_table_says(scene: Scene, folders: Path, tmp_path: Path) -> None:
    with open_scene(scene, tmp_path) as machine:
        outcomes = storm(machine, scene)
        undone = attack(machine, "root", "undo")
    LEDGER.enter(str(scene), [*outcomes, *undone], is_guarded=scene.layers == ALL)
    surprises = expected.find_surprises(scene, [*outcomes, *undone])
    assert not surprises, "\n".join(surprises)
    intrusions = [outcome for outcome in outcomes if expected.is_intrusion(outcome)]
    if scene.layers == ALL:
        assert intrusions == []
    if scene.layers == NONE:
        # The suite can see an intrusion: these are the ones that a guest without the wall must let through.
        assert {(o.attempt, o.type, o.cid, o.result) for o in intrusions} >= {
            ("connect", "stream", "1", "served"),
            ("connect", "stream", "own", "served"),
            ("connect", "seqpacket", "1", "connected"),
            ("connect", "seqpacket", "own", "connected"),
            ("bind", "stream", "any", "bound"),
        }


def storm(machine: Machine, scene: Scene) -> list[Outcome]:
    """Everything, by everybody, before and after root asked for vsock_loopback; and vshd still serves the host."""
    outcomes = read_outcomes(machine.run(["cat", f"{RECORDS}/squat.jsonl"]).stdout.decode())
    for who in ("user", "namespace"):
        outcomes += attack(machine, who, "climb")
    for phase in ("plain", "loopback"):
        if phase == "loopback":
            asked = machine.run(["modprobe", "vsock_loopback"])
            assert (asked.exit == 0) is not scene.layers.transport, asked.stderr
        for who in WHO:
            outcomes += attack(machine, who, "connect", phase, str(CID), str(USER_READY_PORT))
    outcomes += attack(machine, "user", "flood", str(CID))
    assert machine.run(["echo", "alive"]).stdout == b"alive\n"
    return outcomes
