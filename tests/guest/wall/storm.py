"""Everything that the attacker can try in one guest, and the verdict: the same on every backend."""

from dataclasses import replace

from tests.guest.wall import expected
from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import ALL, NONE, RECORDS, Outcome, Scene, Target, attack, read_outcomes

WHO = ("user", "namespace", "root")
# What a guest without the wall must let through, or the suite is blind.
MUST_SUCCEED = {
    ("connect", "stream", "1", "served"),
    ("connect", "stream", "own", "served"),
    ("connect", "seqpacket", "1", "connected"),
    ("connect", "seqpacket", "own", "connected"),
    ("bind", "stream", "any", "bound"),
}


def storm(target: Target, scene: Scene, cid: int, ready_port: int) -> None:
    """Attacks a fresh guest of `scene`, enters that into the ledger, and asserts that all ended as the table says."""
    outcomes = _name_own(_try_everything(target, scene, cid, ready_port), cid)
    undone = attack(target, "root", "undo")
    LEDGER.enter(str(scene), [*outcomes, *undone], is_guarded=scene.layers == ALL)
    surprises = expected.find_surprises(scene, [*outcomes, *undone])
    assert not surprises, "\n".join(surprises)
    intrusions = [outcome for outcome in outcomes if expected.is_intrusion(outcome)]
    if scene.layers == ALL:
        assert intrusions == []
    if scene.layers == NONE:
        assert {(o.attempt, o.type, o.cid, o.result) for o in intrusions} >= MUST_SUCCEED


def _name_own(outcomes: list[Outcome], cid: int) -> list[Outcome]:
    """Where the guest has one of the CIDs that every guest tries as a neighbour's, that is its own."""
    return [replace(outcome, cid="own") if outcome.cid == str(cid) else outcome for outcome in outcomes]


def _try_everything(target: Target, scene: Scene, cid: int, ready_port: int) -> list[Outcome]:
    """By everybody, before and after root asked for vsock_loopback; and vshd still serves the host."""
    outcomes = read_outcomes(target.run(["cat", f"{RECORDS}/squat.jsonl"]).stdout.decode())
    for who in ("user", "namespace"):
        outcomes += attack(target, who, "climb")
    for phase in ("plain", "loopback"):
        if phase == "loopback":
            asked = target.run(["modprobe", "vsock_loopback"])
            assert (asked.exit == 0) is not scene.layers.transport, asked.stderr
        for who in WHO:
            outcomes += attack(target, who, "connect", phase, str(cid), str(ready_port))
    outcomes += attack(target, "user", "flood", str(cid))
    assert target.run(["echo", "alive"]).stdout == b"alive\n"
    return outcomes
