"""The guest's own users and its root against every set of layers: each attempt ends as the table says."""

from collections import Counter
from pathlib import Path

import pytest

from tests.guest.wall import expected
from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import (
    ALL,
    CID,
    MATRIX,
    NONE,
    RECORDS,
    USER_READY_PORT,
    Outcome,
    Scene,
    attack,
    open_scene,
    read_outcomes,
)
from vmkit.machine.machine import Machine

WHO = ("user", "namespace", "root")
SCENES = [Scene(layers, kernel=kernel) for kernel in ("6.12", "6.1") for layers in MATRIX]


@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_every_attempt_ends_as_the_table_says(scene: Scene, folders: Path, tmp_path: Path) -> None:
    with open_scene(scene, tmp_path) as machine:
        outcomes = storm(machine, scene)
        undone = attack(machine, "root", "undo")
    enter(scene, [*outcomes, *undone])
    surprises = find_surprises(scene, [*outcomes, *undone])
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
    assert machine.run(["echo", "alive"]).stdout == b"alive\n"
    return outcomes


def enter(scene: Scene, outcomes: list[Outcome]) -> None:
    intrusions = sum(map(expected.is_intrusion, outcomes))
    by_root = sum(outcome.who == "root" and outcome.result in ("served", "connected") for outcome in outcomes)
    LEDGER.add(str(scene), len(outcomes), intrusions, by_root, is_guarded=scene.layers == ALL)


def find_surprises(scene: Scene, outcomes: list[Outcome]) -> list[str]:
    """Attempts that ended otherwise than the table says, equal ones together."""
    found: Counter[str] = Counter()
    for outcome in outcomes:
        wanted = expected.expect(scene, outcome)
        if outcome.result not in wanted:
            what = f"{outcome.attempt} {outcome.type} cid {outcome.cid} port {outcome.port} from {outcome.source}"
            who = f"{outcome.who}, {outcome.phase}"
            found[f"{what} by {who}: {outcome.result}, not {' or '.join(sorted(wanted))}"] += 1
    return [f"{text} ({count}x)" for text, count in found.items()]
