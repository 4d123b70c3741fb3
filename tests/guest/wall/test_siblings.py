"""Two guests on one host, backend `user`: neither reaches the other, whatever its own layers are."""

from pathlib import Path

import pytest

from tests.guest.wall import expected
from tests.guest.wall.ledger import LEDGER
from tests.guest.wall.scene import ALL, CID, NONE, USER_READY_PORT, Layers, Scene, attack, open_scene

# One of the CIDs that the attacker tries; elsewhere nobody has it.
SIBLING_CID = 4


@pytest.mark.parametrize("layers", [NONE, ALL], ids=str)
def test_sibling_is_out_of_reach(layers: Layers, own_registry: None, tmp_path: Path) -> None:
    scene = Scene(layers)
    open_to_all = Scene(NONE)
    with (
        open_scene(open_to_all, tmp_path, name="sibling", cid=SIBLING_CID) as sibling,
        open_scene(scene, tmp_path) as machine,
    ):
        outcomes = []
        for who in ("user", "root"):
            outcomes += attack(machine, who, "connect", "plain", str(CID), str(USER_READY_PORT))
        aimed = [outcome for outcome in outcomes if outcome.cid == str(SIBLING_CID)]
        heard = sibling.run(["dmesg"]).stdout.decode()
    assert aimed
    wrong = [outcome for outcome in aimed if outcome.result not in expected.expect(scene, outcome)]
    assert wrong == []
    # What vshd there heard came from the host alone.
    callers = {line.partition("vsock ")[2].partition(":")[0] for line in heard.splitlines() if "vshd: vsock " in line}
    LEDGER.add(f"a sibling, backend user, layers {layers}", len(aimed), len(callers - {"2"}))
    assert callers <= {"2"}
