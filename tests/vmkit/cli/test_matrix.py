"""`vmkit matrix` with a QEMU that plays scenarios: reports, statuses, and that no machine is left."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.docs.schemas import check_form
from tests.vmkit.cli.conftest import DEADLINE_S, Vmkit
from vmkit.junit import CaseVerdict
from vmkit.matrix.cellfolder import open_cell
from vmkit.matrix.execute import MatrixRun
from vmkit.matrix.plan import read_matrix
from vmkit.matrix.results import CellResult
from vsh.registry import read_machines

WriteMatrix = Callable[..., Path]


@pytest.fixture
def write_matrix(recipe: str, tmp_path: Path) -> WriteMatrix:
    def write(scenario: str) -> Path:
        path = tmp_path / "lab.toml"
        head = f'images = ["{recipe}"]\nbackends = ["user", "vhost"]\nappend = "fake={scenario}"\n'
        path.write_text(head + '[commands]\none = "true"\ntwo = "true"\n')
        return path

    return write


def test_machines_that_do_not_start_are_errors_and_vhost_is_skipped(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    junit = tmp_path / "reports" / "junit.xml"
    done = vmkit("matrix", str(write_matrix("panic")), "--junit", str(junit), "--quiet")
    assert done.status == 1
    assert done.out.count("error: ") == 2 and done.out.count("skipped: this host cannot run the backend vhost") == 2
    suite = Xml.parse(junit).getroot()[0]
    assert (suite.get("errors"), suite.get("skipped"), suite.get("failures")) == ("2", "2", "0")
    assert read_machines() == []


def test_kernel_that_panics_in_a_test_of_its_boot_has_the_results_until_then(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    """As one with KUnit built in."""
    matrix = write_matrix("panic-in-a-test")
    matrix.write_text('ktap = ["two"]\n' + matrix.read_text())
    junit = tmp_path / "junit.xml"
    done = vmkit("matrix", str(matrix), "--only", "my/own/user", "--junit", str(junit), "--quiet")
    assert done.status == 1
    one, two, *tests = Xml.parse(junit).getroot()[0]
    assert [case.get("classname") for case in (one, two, *tests)] == ["my.own.user"] * 2 + ["my.own.user.two"] * 3
    assert [(case.get("name"), None if not len(case) else str(case[0].get("message"))) for case in tests] == [
        ("a", None),
        ("test 2", "the guest's kernel panicked: Fatal exception"),
        ("test 3", "did not run: the guest's kernel panicked: Fatal exception"),
    ]
    assert "b begins" in str(tests[1][0].text)


def test_one_cell(vmkit: Vmkit, write_matrix: WriteMatrix) -> None:
    done = vmkit("matrix", str(write_matrix("ready")), "--only", "my/own/vhost", "--quiet")
    # All of it was skipped: nothing failed.
    assert (done.status, done.out.count("skipped: ")) == (0, 2)


def test_cells_for_github(vmkit: Vmkit, write_matrix: WriteMatrix) -> None:
    path = str(write_matrix("ready"))
    for words in ((path, "--github"), ("run", "--github", path), ("emit", "github", path)):
        done = vmkit("matrix", *words)
        assert done.out == 'matrix={"include": [{"cell": "my/own/user"}, {"cell": "my/own/vhost"}]}\n'


@pytest.mark.parametrize(
    ("scenario", "status", "verdict"), [("panic", 1, "failed"), ("exit-at-once", 125, "machine failed")]
)
def test_status_tells_the_test_from_the_machine(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path, scenario: str, status: int, verdict: str
) -> None:
    results = tmp_path / "results"
    path = str(write_matrix(scenario))
    words = ("--cell", "0", "--to", str(results), "--retry-machine-failures", "1", "--quiet")
    done = vmkit("matrix", "run", path, *words)
    assert done.status == status, done.err
    record = json.loads((results / "000000/results.json").read_text())
    check_form("matrix-result", record)
    assert (record["verdict"], record["status"], record["cell"]) == (verdict, status, "my/own/user")
    # The machine's failure alone is tried again, and the record has both attempts.
    assert record["attempt"] == (1 if status == 1 else 2)
    assert [one["fault"] for one in record["earlier"]] == ([] if status == 1 else ["machine"])
    # A failure may be due to these, and a machine that was never ready has them as well.
    machine = record["machine"]
    assert machine["qemu"] and machine["accelerator"] in ("kvm", "tcg") and machine["backend"] == "user"
    assert (machine["started_by"], machine["seconds"]) == (None, None)
    assert Xml.parse(results / "000000/junit.xml").getroot()[0].get("errors") == "2"
    assert {path.name for path in results.iterdir()} == {"plan.json", "000000"}
    if status == 1:
        assert "Kernel panic" in (results / "000000/console.log").read_text()
        # It is decided: an engine that starts the job again gets the same answer, and no machine starts.
        again = vmkit("matrix", "run", path, *words)
        assert (again.status, again.out) == (1, done.out)


def test_shard_of_an_engine_runs_its_own_cells(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI_NODE_INDEX", "2")
    monkeypatch.setenv("CI_NODE_TOTAL", "2")
    done = vmkit("matrix", str(write_matrix("ready")), "--shard", "auto", "--quiet")
    assert (done.status, done.out.count("skipped: ")) == (0, 2), done.err
    assert {path.name for path in (tmp_path / "matrix-results").iterdir()} == {"plan.json", "000001"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cell", "2"), "--cell must be between 0 and 1, not 2: the matrix has 2 cells"),
        (("--cell", "0", "--shard", "1/2"), "give one of --only, --cell and --shard"),
        (("--shard", "3/2"), "--shard 3/2: the number must be between 1 and 2"),
        (("--cell", "-1"), "Invalid value for '--cell': must be at least 0, not -1"),
    ],
)
def test_cells_that_are_not_there_are_bad_usage(
    vmkit: Vmkit, write_matrix: WriteMatrix, words: tuple[str, ...], said: str
) -> None:
    done = vmkit("matrix", "run", str(write_matrix("ready")), *words)
    assert (done.status, done.err.splitlines()[0]) == (64, f"vmkit: {said}")


def test_cell_that_another_process_runs_is_left_alone(vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with open_cell(tmp_path / "results", 0):
        done = vmkit("matrix", str(write_matrix("ready")), "--cell", "0", "--to", str(tmp_path / "results"), "-q")
    assert done.status == 125
    assert "another process runs cell 0" in done.err


def test_deadline_ends_what_runs_and_what_waits_does_not_start(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    path = write_matrix("silent")
    path.write_text("fresh = true\n" + path.read_text().replace('["user", "vhost"]', '["user"]'))
    words = ("--jobs", "1", "--deadline", "1", "--to", str(tmp_path / "results"), "--quiet")
    done = vmkit("matrix", str(path), *words)
    assert done.status == 124
    assert "1 cell did not run: the deadline of the run has passed" in done.err
    # The one that was cut is as if it had been killed: the next run of this job does it again.
    record = json.loads((tmp_path / "results/000000/results.json").read_text())
    assert (record["state"], record["verdict"], record["commands"]) == ("running", "killed", [])
    assert read_machines() == []


def test_too_many_failures_stop_the_run(vmkit: Vmkit, write_matrix: WriteMatrix) -> None:
    path = write_matrix("panic")
    path.write_text("fresh = true\n" + path.read_text().replace('["user", "vhost"]', '["user"]'))
    done = vmkit("matrix", str(path), "--jobs", "1", "--max-failures", "1", "--quiet")
    assert done.status == 1
    assert "1 cell did not run: 1 cell failed, and --max-failures is 1" in done.err


def test_interruption_ends_every_machine(write_matrix: WriteMatrix, folders: Path) -> None:
    words = [sys.executable, "-m", "vmkit", "matrix", str(write_matrix("silent"))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if b"at once" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGINT, err
    assert read_machines() == []


def test_cell_whose_run_is_killed_is_in_the_report_as_killed(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    path, results = str(write_matrix("silent")), tmp_path / "results"
    words = [sys.executable, "-m", "vmkit", "matrix", "run", path, "--cell", "0", "--to", str(results), "--quiet"]
    end_s = time.monotonic() + DEADLINE_S
    with subprocess.Popen(words, process_group=0) as process:
        while not (results / "000000/results.json").exists():
            assert process.poll() is None and time.monotonic() < end_s
            time.sleep(0.02)
        process.kill()
    done = vmkit("matrix", "merge", str(results), "--to", str(tmp_path / "report"))
    assert (done.status, done.out.splitlines()[-1]) == (125, "2 cells: 1 killed, 1 missing")
    suite = Xml.parse(tmp_path / "report/junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("errors")) == ("4", "4")
    # The lock is free: an engine starts the job again.
    with open_cell(results, 0) as folder:
        assert folder.previous is not None and not folder.previous.is_decided


def test_end_of_a_run_waits_for_cells_that_nobody_else_counts(write_matrix: WriteMatrix, folders: Path) -> None:
    """A signal can come when a cell's thread has been started and its future is in no list yet."""
    matrix = read_matrix(write_matrix("silent"))
    run = MatrixRun(matrix)
    results: list[CellResult] = []
    cell = next(cell for cell in matrix.cells if cell.backend == "user")
    thread = threading.Thread(target=lambda: results.extend(run.run_cell(cell)))
    thread.start()
    run.end_all()
    assert read_machines() == []
    thread.join(DEADLINE_S)
    assert [result.verdict for result in results] == [CaseVerdict.ERROR, CaseVerdict.ERROR]
    assert [result.brief for result in run.run_cell(cell)] == ["interrupted", "interrupted"]


def test_report_that_cannot_be_written_is_no_failed_test(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    """1 would tell an engine that a test failed, and that no other job can find out more."""
    (tmp_path / "reports").write_text("")
    words = ("matrix", str(write_matrix("ready")), "--only", "my/own/vhost", "--quiet")
    done = vmkit(*words, "--junit", str(tmp_path / "reports/junit.xml"))
    assert done.status == 125
    assert "reports" in done.err and "internal error" not in done.err
    results = tmp_path / "results"
    assert vmkit(*words, "--to", str(results)).status == 0
    assert vmkit("matrix", "merge", str(results), "--to", str(tmp_path / "reports/merged")).status == 125


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_cannot_be_written_is_no_failed_test(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path, stream: str
) -> None:
    """As a job's log on a full disk. Nothing is lost: the results are there."""
    path, results, report = str(write_matrix("ready")), str(tmp_path / "results"), str(tmp_path / "report")
    cell, merge = ("run", path, "--cell", "1", "--to", results), ("merge", results, "--to", report)
    assert vmkit("matrix", *cell).status == 0
    for words, status in (
        (cell, 125),
        (("run", path, "--cell", "1", "--json"), 125),
        # One cell is missing, which has this status anyway: it is not 1.
        (merge, 125),
        (("run", path, "--cell", "2"), 64),
    ):
        argv = [sys.executable, "-m", "vmkit", "matrix", *words]
        with Path("/dev/full").open("wb") as full:
            streams = (full, subprocess.PIPE) if stream == "stdout" else (subprocess.PIPE, full)
            done = subprocess.run(argv, stdout=streams[0], stderr=streams[1], timeout=DEADLINE_S, check=False)
        assert done.returncode == status, words
        if stream == "stdout" and words in (cell, merge):
            assert b"cannot write the answer: No space left on device" in done.stderr
    assert (tmp_path / "report/junit.xml").exists()


def test_missing_file(vmkit: Vmkit) -> None:
    done = vmkit("matrix", "/nonexistent.toml")
    assert done.status == 64
    assert "cannot read the matrix /nonexistent.toml" in done.err


def test_lock_refuses_another_image_before_a_machine_starts(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path
) -> None:
    path = write_matrix("ready")
    done = vmkit("matrix", "lock", str(path), "--quiet")
    assert (done.status, done.out) == (0, f"{tmp_path}/lab.lock has 1 image and 0 kernels\n"), done.err
    words = ("matrix", "run", str(path), "--only", "my/own/vhost", "--quiet")
    assert vmkit(*words).status == 0
    lock = json.loads((tmp_path / "lab.lock").read_text())
    lock["images"]["my/amd64"] = "0" * 64
    (tmp_path / "lab.lock").write_text(json.dumps(lock))
    done = vmkit(*words)
    assert done.status == 64
    assert f"the image my/amd64 is another than {tmp_path}/lab.lock has" in done.err
    path.write_text(path.read_text().replace('"true"', '"false"'))
    assert "was changed after" in vmkit(*words).err


def test_events_tell_a_program_of_each_cell(vmkit: Vmkit, write_matrix: WriteMatrix) -> None:
    done = vmkit("matrix", "run", str(write_matrix("exit-at-once")), "--json", "--retry-machine-failures", "1")
    assert done.status == 125
    events = [json.loads(line) for line in done.out.splitlines()]
    for event in events:
        check_form("matrix-event", event)
    first, *cells, last = events
    assert (first["event"], first["cells"], last["event"], last["status"]) == ("begin", 2, "end", 125)
    assert sorted((cell["cell"], cell["verdict"], cell["attempt"], cell["repeated"]) for cell in cells) == [
        ("my/own/user", "machine failed", 1, True),
        ("my/own/user", "machine failed", 2, False),
        ("my/own/vhost", "skipped", 1, False),
    ]
    # Logs have a line for each cell, with what it is about.
    assert "my/own/user: one error, two error, and runs again (" in done.err


def test_merge_names_what_failed_and_what_is_missing(vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path) -> None:
    path, results, report = str(write_matrix("panic")), str(tmp_path / "results"), str(tmp_path / "report")
    assert vmkit("matrix", path, "--shard", "2/2", "--to", results, "--quiet").status == 0
    done = vmkit("matrix", "merge", results, "--to", report)
    # A failed machine and a cell that never ran say the same of the test.
    assert (done.status, done.out.splitlines()[-1]) == (125, "2 cells: 1 missing, 1 skipped")
    assert done.out.splitlines()[1].split()[:2] == ["my/own/user", "missing"]
    assert vmkit("matrix", path, "--shard", "1/2", "--to", results, "--quiet").status == 1
    done = vmkit("matrix", "merge", results, "--to", report, "--before", report)
    assert (done.status, done.out.splitlines()[-1]) == (1, "2 cells: 1 failed, 1 skipped")
    assert "my/own/user: missing before, failed now" in done.out
    assert (tmp_path / "report/report.html").read_text().startswith("<!DOCTYPE html>")
    done = vmkit("matrix", path, "--shard", "1/2", "--to", results, "--times", report, "--quiet")
    assert done.status == 1, done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge", ".", "--to", "x", "--origin", "My CI"), "--origin must have lower-case letters, digits and '_'"),
        (("merge", "/nonexistent", "--to", "x"), "there is no directory /nonexistent"),
        (("merge", "."), "Missing option '--to'"),
        (("run", "lab.toml", "--times", "x"), "--times shares the cells out, and needs --shard"),
    ],
)
def test_wrong_words_for_a_merge_are_bad_usage(
    vmkit: Vmkit, write_matrix: WriteMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_matrix("ready")
    done = vmkit("matrix", *words)
    assert done.status == 64
    assert said in done.err
