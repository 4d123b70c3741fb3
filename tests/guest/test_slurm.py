"""A matrix on a real Slurm cluster: a task that is killed runs again, and one report has all cells.

Two kernels and three commands are six cells. One guest panics, one test fails, and one task is killed while it runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import pytest

from tests.guest.slurm_cluster import Cluster, start_cluster

pytestmark = [pytest.mark.slow, pytest.mark.vm]

# A task has two machines' time here, and the killed one a second start.
LIMIT_S = 900
KERNEL = 'extends = "tiny"\nsuite = "trixie"\nkernel_suite = "bookworm"\n'
# The third one runs until the test has killed its task once.
MATRIX = """\
images = ["tiny", "./older.toml"]
fresh = true

[commands]
panics = "uname -r; case $(uname -r) in 6.1.*) echo c > /proc/sysrq-trigger; sleep 60;; esac"
fails = "uname -r; case $(uname -r) in 6.12.*) exit 3;; esac"
lasts = "uname -r; sleep 20"
"""
CELLS = ("tiny/own/auto/panics", "tiny/own/auto/fails", "tiny/own/auto/lasts")
OLDER = tuple(name.replace("tiny", "older") for name in CELLS)
KILLED = 2
Found = TypeVar("Found")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: Path) -> Iterator[Cluster]:
    # The tasks find our programs as they find any other.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    folder = tmp_path / "slurm"
    folder.mkdir(mode=0o755)
    with start_cluster(folder) as cluster:
        yield cluster


def vmkit(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "vmkit", *words], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def find_task(number: int) -> int | None:
    """The process of vmkit that runs the cell of this number."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"matrix" in words and b"--cell" in words and words[words.index(b"--cell") + 1] == b"%d" % number:
            return int(folder.name)
    return None


def find_other_task(number: int, first: int) -> int | None:
    found = find_task(number)
    return None if found == first else found


def wait_for(what: str, find: Callable[[], Found | None], limit_s: float) -> Found:
    deadline_s = time.monotonic() + limit_s
    while not (found := find()):
        assert time.monotonic() < deadline_s, f"{what}: not within {limit_s} s"
        time.sleep(0.2)
    return found


def test_array_of_six_cells_is_one_report(cluster: Cluster, tmp_path: Path) -> None:
    lab, results = tmp_path / "lab", tmp_path / "results"
    lab.mkdir()
    (lab / "older.toml").write_text(KERNEL)
    (lab / "lab.toml").write_text(MATRIX)
    for image in ("tiny", "./older.toml"):
        assert vmkit("build", "--quiet", image, cwd=lab).returncode == 0
    emitted = vmkit("matrix", "emit", "slurm", str(lab / "lab.toml"), "--to", str(results), cwd=lab)
    assert (emitted.returncode, emitted.stderr) == (0, "")
    (lab / "lab.sh").write_text(emitted.stdout)
    submitted = cluster.run("sh", str(lab / "lab.sh"), "--chdir", str(lab))
    array, merge = submitted.split()[1], submitted.split()[7]
    print(submitted)

    task = wait_for("the task", lambda: find_task(KILLED), LIMIT_S)
    os.kill(task, signal.SIGKILL)
    wait_for("the second start", lambda: find_other_task(KILLED, task), LIMIT_S)
    wait_for("the end of all jobs", lambda: not cluster.run("squeue", "--noheader").strip(), LIMIT_S)

    for output in sorted((results / "slurm").iterdir()):
        print(f"--- {output.name}\n{output.read_text(errors='replace')}")
    merged = json.loads((results / "merged" / "results.json").read_text())
    verdicts = {cell["cell"]: cell["verdict"] for cell in merged["cells"]}
    failed = {CELLS[1], OLDER[0]}
    assert verdicts == {name: "failed" if name in failed else "passed" for name in CELLS + OLDER}
    briefs = {cell["cell"]: cell["brief"] for cell in merged["cells"]}
    assert "panicked: sysrq triggered crash" in briefs[OLDER[0]]
    report = ElementTree.parse(results / "merged" / "junit.xml").getroot()
    suites = report.iter("testsuite")
    assert sum(int(suite.get("tests", "0")) for suite in suites) == 6
    assert len(list(report.iter("testcase"))) == 6
    assert array != merge
    log = (results / "slurm" / f"{array}_{KILLED}.log").read_text()
    assert "Killed" in log
