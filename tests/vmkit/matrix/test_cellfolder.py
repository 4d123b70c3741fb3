"""The folder of a cell: whole after a kill at any moment, one writer, and errors that say what to do."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.docs.schemas import check_form
from vmkit.errors import ConfigError, HostError
from vmkit.junit import CaseVerdict
from vmkit.ktap.results import KtapResult
from vmkit.matrix.cellfolder import CellFolder, open_cell, open_results, read_plan, read_record
from vmkit.matrix.job import CellEnd, JobPlan, make_record, run_job
from vmkit.matrix.lock import describe_lock
from vmkit.matrix.plan import plan_matrix
from vmkit.matrix.results import (
    CellFault,
    CellRecord,
    CellResult,
    fit_record,
    make_command_record,
    parse_record,
    render_record,
)

PASSED, FAILED, ERROR, SKIPPED = CaseVerdict
MATRIX = plan_matrix({"commands": {"one": "true", "two": "true"}, "images": ["tiny", "debian"]}, Path("/lab.toml"))


def result(index: int, verdict: CaseVerdict = PASSED, fault: CellFault = CellFault.NONE, text: str = "") -> CellResult:
    cell = MATRIX.cells[0]
    tests = (KtapResult(("a", "b"), PASSED, "", "x\udc80"),)
    return CellResult(cell, cell.commands[index], verdict, 1.5, "why", text, tests, fault)


def begin(folder: CellFolder) -> None:
    folder.begin(make_record(MATRIX, 0))


def read(folder: Path) -> CellRecord:
    record = read_record(folder / "000000")
    assert record is not None
    return record


@pytest.fixture
def results(tmp_path: Path) -> Path:
    open_results(tmp_path / "results", MATRIX)
    return tmp_path / "results"


def test_record_has_what_was_done_so_far_and_names_what_was_not(results: Path) -> None:
    with open_cell(results, 0) as folder:
        begin(folder)
        folder.set_machine({"accelerator": "tcg"})
        folder.add(result(0), 2.0)
        half = read(results)
        suite = Xml.parse(results / "000000/junit.xml").getroot()[0]
        folder.add(result(1), 3.0)
        folder.end(3.5)
    assert (half.state, half.verdict, half.fault, half.is_decided) == ("running", "killed", CellFault.MACHINE, False)
    assert [(case.get("name"), case[0].tag if len(case) else "passed") for case in suite] == [
        ("one", "passed"),
        ("b", "system-out"),
        ("two", "error"),
    ]
    assert suite[2][0].get("message") == "did not run: the run ended before the cell did"
    whole = read(results)
    assert (whole.verdict, whole.seconds, whole.machine, whole.is_decided) == (
        "passed", 3.5, {"accelerator": "tcg"}, True
    )  # fmt: skip
    assert whole.commands[0].tests == result(0).tests
    check_form("matrix-result", json.loads((results / "000000/results.json").read_text()))
    assert {path.name for path in (results / "000000").iterdir()} == {"lock", "junit.xml", "results.json"}


def test_next_attempt_keeps_the_files_of_the_last_one(results: Path, tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("first")
    with open_cell(results, 0) as folder:
        begin(folder)
        folder.add(result(0), 2.0)
        folder.keep_logs(tmp_path)
    with open_cell(results, 0) as folder:
        assert folder.previous is not None and not folder.previous.is_decided
        begin(folder)
        folder.add(result(0, ERROR, CellFault.MACHINE), 1.0)
        folder.add(result(1, ERROR, CellFault.MACHINE), 1.0)
        folder.end(1.0)
    with open_cell(results, 0) as folder:
        begin(folder)
        assert folder.attempt == 3
    record = read(results)
    assert [(one.attempt, one.fault, one.seconds) for one in record.earlier] == [
        (1, "killed", None),
        (2, "machine", 1.0),
    ]
    assert (results / "000000/attempt-1/console.log").read_text() == "first"
    assert not (results / "000000/console.log").exists()
    aside = read_record(results / "000000/attempt-2")
    assert aside is not None and aside.verdict == "machine failed" and aside.brief == "one: why"


def test_two_processes_do_not_write_one_cell(results: Path) -> None:
    with (
        open_cell(results, 0),
        open_cell(results, 1),
        pytest.raises(HostError, match="another process runs cell 0") as failure,
        open_cell(results, 0),
    ):
        pass
    assert "--to DIR" in failure.value.hint
    with open_cell(results, 0):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.vmkit.matrix.test_cellfolder import begin, open_cell, result
steps = int(sys.argv[2])
def replace(self, target, original=Path.replace):
    global steps
    steps -= 1
    if steps < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, target)
Path.replace = replace
with open_cell(Path(sys.argv[1]), 0) as folder:
    begin(folder)
    folder.set_machine({})
    folder.add(result(0, text="x" * 10000), 1.0)
    folder.end(1.0)
"""


@pytest.mark.parametrize("steps", range(8))
def test_kill_at_any_moment_leaves_whole_files_and_no_lock(results: Path, steps: int) -> None:
    """Each file gets its name by a rename. The kill comes before one of them, when the new file has been written."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(results), str(steps)], check=False, cwd=Path.cwd())
    assert done.returncode in (-signal.SIGKILL, 0)
    with open_cell(results, 0) as folder:
        report = results / "000000/junit.xml"
        if report.exists():
            Xml.parse(report)
        previous = folder.previous
        assert previous is None or previous.state == ("ended" if done.returncode == 0 else "running")
        begin(folder)
        folder.end(1.0)
    assert not list((results / "000000").glob(".*"))


def test_full_disk_is_an_error_and_the_old_record_stays(results: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_cell(results, 0) as folder:
        begin(folder)
        folder.add(result(0), 1.0)
        old = (results / "000000/results.json").read_bytes()
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) + 100, before[1]))
        try:
            with pytest.raises(HostError, match=r"cannot write to .*000000") as failure:
                folder.add(result(1, text="x" * 100_000), 2.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)
    assert failure.value.hint == "make room there"
    assert (results / "000000/results.json").read_bytes() == old
    assert os.strerror(errno.EFBIG) in failure.value.brief


def test_results_of_another_matrix_are_not_mixed(results: Path) -> None:
    open_results(results, MATRIX)
    changed = plan_matrix({"commands": {"one": "false"}}, Path("/lab.toml"))
    with pytest.raises(ConfigError, match="has results of another matrix"):
        open_results(results, changed)
    plan = read_plan(results)
    assert plan is not None
    assert (plan.matrix, plan.cells) == (MATRIX.digest, tuple(cell.name for cell in MATRIX.cells))
    assert plan.list_commands("tiny/own/auto") == ("one", "two")
    fresh = plan_matrix({"commands": {"one": "false"}, "fresh": True}, Path("/lab.toml"))
    open_results(results.with_name("fresh"), fresh)
    plan = read_plan(results.with_name("fresh"))
    assert plan is not None and plan.list_commands("tiny/own/auto/one") == ("one",)


def test_result_of_another_matrix_is_never_taken_for_one_of_this(results: Path) -> None:
    """Two jobs that begin at the same moment both find no plan, and the last one's stays."""
    with open_cell(results, 0) as folder:
        begin(folder)
        folder.add(result(0), 1.0)
        folder.add(result(1), 2.0)
        folder.end(2.0)
    kept: list[CellEnd] = []
    run_job(JobPlan(MATRIX, [0], 1, results), kept.append)
    assert [(end.is_kept, end.verdict) for end in kept] == [(True, "passed")]
    (results / "plan.json").unlink()
    changed = plan_matrix({"commands": {"one": "false", "two": "true"}}, Path("/lab.toml"))
    with pytest.raises(ConfigError, match="000000 has the result of a cell of another matrix"):
        run_job(JobPlan(changed, [0], 1, results), kept.append)


def test_result_of_a_kernel_that_was_built_again_is_not_kept(tmp_path: Path) -> None:
    # A machine of a recipe that is not there cannot start. So a cell that runs again fails.
    matrix = plan_matrix(
        {"commands": {"one": "true"}, "images": ["./no.toml"], "kernels": ["k"]}, tmp_path / "lab.toml"
    )
    (tmp_path / "k").write_text("a kernel")
    results = tmp_path / "results"
    ends: list[CellEnd] = []

    def run() -> CellEnd:
        found = describe_lock(matrix, [0], {"no/amd64": "digest"})
        run_job(JobPlan(matrix, [0], 1, results, found=found), ends.append)
        return ends[-1]

    assert (run().verdict, run().attempt) == ("machine failed", 2)
    with open_cell(results, 0) as folder:
        content = read(results).content
        folder.begin(make_record(matrix, 0, content))
        folder.add(CellResult(matrix.cells[0], matrix.cells[0].commands[0], PASSED, 1.0, ""), 1.0)
        folder.end(1.0)
    assert (run().is_kept, ends[-1].verdict, len(read(results).earlier)) == (True, "passed", 2)
    (tmp_path / "k").write_text("another kernel")
    assert (run().is_kept, ends[-1].verdict, ends[-1].attempt) == (False, "machine failed", 4)
    # What ran another kernel is no attempt at this one.
    assert read(results).earlier == ()
    assert (results / "000000/attempt-3/results.json").is_file()


def damage(text: str) -> list[bytes]:
    value = json.loads(text)
    return [
        b"",
        text[: len(text) // 2].encode(),
        b"[]",
        b"\xff",
        json.dumps({**value, "state": "odd"}).encode(),
        json.dumps({**value, "commands": [{}]}).encode(),
        json.dumps({**value, "seconds": []}).encode(),
        json.dumps({key: one for key, one in value.items() if key != "matrix"}).encode(),
    ]


def test_damaged_record_and_one_of_another_version_are_named(results: Path) -> None:
    text = render_record(make_record(MATRIX, 0)).decode()
    for data in damage(text):
        with pytest.raises(ConfigError, match="the/place has no results of a cell"):
            parse_record(data, "the/place")
    with pytest.raises(ConfigError, match="the/place is of form 2, and this vmkit reads form 1"):
        parse_record(json.dumps({"schema": 2}).encode(), "the/place")


def make_loud(tests: int, log: str, path: tuple[str, ...] = ("a",)) -> CellRecord:
    cell = MATRIX.cells[0]
    found = tuple(KtapResult((*path, str(n)), FAILED if n == 0 else PASSED, "", log) for n in range(tests))
    one = CellResult(cell, cell.commands[0], FAILED, 1.0, "1 failed", "text", found, CellFault.TEST)
    return replace(make_record(MATRIX, 0), commands=(make_command_record(one),))


@pytest.mark.parametrize(
    ("record", "logs", "tests"),
    [
        (make_loud(3, "log"), 3, 3),
        (make_loud(100, "\N{REPLACEMENT CHARACTER}" * 100), 1, 100),
        (make_loud(3, "x" * 20_000), 0, 3),
        # A line for each test is enough to make the guest's host render the names of all tests around each.
        (make_loud(1000, "", ("n" * 1024,) * 31), 0, 0),
    ],
)
def test_guest_that_prints_too_much_loses_logs_and_never_its_verdict(record: CellRecord, logs: int, tests: int) -> None:
    short, data = fit_record(record, 20_000)
    assert len(data) <= 20_000
    read = parse_record(data, "place")
    assert read == replace(short, started=read.started)
    (command,) = read.commands
    assert (command.verdict, command.fault, command.brief) == (FAILED, CellFault.TEST, "1 failed")
    assert (sum(bool(test.log) for test in command.tests), len(command.tests)) == (logs, tests)
    assert bool(tests) or "left out the results of 1000 tests" in command.text


def test_plan_that_is_damaged_is_named(results: Path) -> None:
    for text in ("", "{}", "[]", "null", '{"schema": 1, "matrix": "x"}'):
        (results / "plan.json").write_text(text)
        with pytest.raises(ConfigError, match=r"plan.json is damaged"):
            read_plan(results)
    (results / "plan.json").write_text('{"schema": 2}')
    with pytest.raises(ConfigError, match="is of form 2, and this vmkit reads form 1"):
        read_plan(results)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"cannot write to .*file/results: Not a directory"):
        open_results(tmp_path / "file" / "results", MATRIX)
