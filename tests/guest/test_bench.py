"""The race itself, at its smallest: every heat runs, and has all its sides. What comes out is nobody's figure."""

from pathlib import Path

import pytest

from vmkit.bench.facts import gather_facts
from vmkit.bench.measurements import AIMS, Pace, run_heats
from vmkit.bench.report import write_report
from vmkit.bench.series import Outcome
from vmkit.bench.testbed import open_track

SMALLEST = Pace(
    rounds=1,
    long_rounds=1,
    bulk_bytes=1 << 20,
    ssh_bulk_bytes=1 << 20,
    forward_bytes=1 << 20,
    at_once=((3, 1),),
    boots=1,
)


@pytest.mark.slow
def test_every_heat_runs_with_all_its_sides(folders: Path, tmp_path: Path) -> None:
    with open_track(accelerator="tcg") as track:
        facts = gather_facts(track)
        series, failures = run_heats(track, SMALLEST, print)
        assert track.paramiko is not None
    assert failures == []
    outcome = Outcome(facts, tuple(series), ())
    for aim in AIMS:
        if aim.heat != "100 at once":
            assert aim.ratio(outcome) is not None, aim
    assert {"ssh -L", "scp", "sftp", "ssh, fastest cipher", "virtual network"} <= {entry.side for entry in series}
    assert len([entry for entry in series if entry.heat == "echo"]) == 3
    assert {
        "QEMU",
        "guest kernel",
        "host OpenSSH",
        "guest OpenSSH",
        "default cipher",
        "accelerator",
        "virtual network",
    } <= facts.keys()
    assert any(path.suffix == ".html" for path in write_report(outcome, tmp_path / "report"))
