"""Merging: each cell once, the worse of two results, and what is missing never passes. Reports say the same."""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.docs.schemas import check_form
from vmkit.errors import ConfigError, HostError
from vmkit.junit import CaseVerdict
from vmkit.ktap.results import KtapResult
from vmkit.matrix.cellfolder import open_cell, open_results
from vmkit.matrix.gather import merge_folders, read_merged, write_merged
from vmkit.matrix.job import make_record
from vmkit.matrix.merge import Found, Merged, count_cases, merge_records
from vmkit.matrix.plan import Matrix, plan_matrix
from vmkit.matrix.results import CellFault, CellRecord, CellResult, CommandRecord, PlanRecord
from vmkit.matrix.schedule import Policy, Schedule
from vmkit.matrix.shards import plan_shards
from vmkit.matrix.summary import MAX_LISTED, list_notes, render_markdown

PASSED, FAILED, ERROR, SKIPPED = CaseVerdict
VERDICTS = {CellFault.NONE: PASSED, CellFault.TEST: FAILED, CellFault.TIME: ERROR, CellFault.MACHINE: ERROR}
HOSTILE = "</td><script>x</script> \x1b[31m & \x00 | `"


def plan(count: int = 6) -> Matrix:
    kernels = [f"k{number}" for number in range(count)]
    return plan_matrix({"commands": {"one": "true", "two": "true"}, "kernels": kernels}, Path("/lab.toml"))


def run_cell(results: Path, matrix: Matrix, number: int, fault: CellFault | None, **fields: Any) -> None:
    """fault: of the second command; None: the run was killed while it ran."""
    with open_cell(results, number) as folder:
        folder.begin(make_record(matrix, number))
        cell = matrix.cells[number]
        folder.add(CellResult(cell, cell.commands[0], PASSED, 1.0, "status 0"), 1.0)
        if fault is not None:
            verdict = VERDICTS[fault]
            folder.add(
                CellResult(cell, cell.commands[1], verdict, 1.0, fields.pop("brief", "why"), fault=fault, **fields), 2
            )
            folder.end(2.0 + number)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Six cells: passed, failed, timed out, of a failed machine, killed, and one that never ran."""
    matrix = plan()
    for number, fault in enumerate((CellFault.NONE, CellFault.TEST, CellFault.TIME, CellFault.MACHINE, None)):
        # As an engine leaves them: a folder for each job.
        folder = tmp_path / "all" / f"job-{number}" / "matrix-results"
        open_results(folder, matrix)
        run_cell(folder, matrix, number, fault)
    return tmp_path / "all"


def merge(results: Path, to: Path, before: Path | None = None) -> Merged:
    merged = merge_folders([results], before)
    write_merged(merged, to, "vmkit")
    return merged


def test_all_reports_count_the_same_and_what_did_not_run_is_missing(results: Path, tmp_path: Path) -> None:
    to = tmp_path / "out"
    merged = merge(results, to)
    counts = {"passed": 1, "failed": 1, "timed out": 1, "machine failed": 1, "killed": 1, "missing": 1}
    assert merged.counts == counts
    assert merged.fault is CellFault.TEST
    suite = Xml.parse(to / "junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("12", "1", "5")
    tags = Counter(case[0].tag if len(case) else "passed" for case in suite)
    assert tags == {"passed": 6, "failure": 1, "error": 5}
    missing = [case for case in suite if case.get("classname") == "tiny.k5.auto"]
    assert [str(case[0].get("message")) for case in missing] == ["did not run: no directory has results of it"] * 2
    value = json.loads((to / "results.json").read_text())
    check_form("matrix-merge", value)
    assert (value["counts"], value["status"]) == (counts, 1)
    assert [cell["verdict"] for cell in value["cells"]] == list(counts)
    table = (to / "table.txt").read_text().splitlines()
    assert len(table) == 7 and table[6].split() == [
        "tiny/k5/auto",
        "missing",
        *["no", "directory", "has", "results", "of", "it"],
    ]
    page = (to / "report.html").read_text()
    assert page.count('class="mark"') >= 5 and "6 cells: 1 passed, 1 failed" in page
    assert "6 cells: 1 passed" in (to / "summary.md").read_text()
    assert {path.name for path in to.iterdir()} == {
        "junit.xml", "results.json", "table.txt", "summary.md", "report.html", "kcidb.json"
    }  # fmt: skip


def test_page_is_well_formed_and_shows_no_text_as_code(results: Path, tmp_path: Path) -> None:
    folder = results / "job-1/matrix-results"
    run_cell_again = plan()
    (folder / "000005").mkdir()
    run_cell(folder, run_cell_again, 5, CellFault.TEST, brief=HOSTILE, text=HOSTILE)
    merge(results, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    # All but the two tags without an end is XML, and a browser takes no other meaning from it.
    body = re.sub(r"<meta[^>]*>", "", page.partition("\n")[2]).replace("\x1b", "").replace("\x00", "")
    assert Xml.fromstring(body).tag == "html"
    assert "\\<script\\>" in (tmp_path / "out/summary.md").read_text()
    Xml.parse(tmp_path / "out/junit.xml")


def test_kcidb_has_a_status_for_each_command(results: Path, tmp_path: Path) -> None:
    merge(results, tmp_path / "out")
    value = json.loads((tmp_path / "out/kcidb.json").read_text())
    assert value["version"] == {"major": 5, "minor": 3}
    (checkout,) = value["checkouts"]
    builds = {build["id"] for build in value["builds"]}
    assert len(builds) == 6 and {build["checkout_id"] for build in value["builds"]} == {checkout["id"]}
    tests = value["tests"]
    assert Counter(test["status"] for test in tests) == {"PASS": 6, "FAIL": 1, "ERROR": 1, "MISS": 4}
    assert len({test["id"] for test in tests}) == 12
    for test in tests:
        assert test["build_id"] in builds
        # Patterns of kcidb-io 5.3.
        assert re.fullmatch(r"[a-z0-9_]+:[^\0]*", test["id"])
        assert re.fullmatch(r"([a-zA-Z0-9_-]+(\.[a-zA-Z0-9_-]+)*)?", test["path"])


def test_tests_of_a_command_are_in_junit_and_kcidb(tmp_path: Path) -> None:
    matrix, results = plan(1), tmp_path / "results"
    open_results(results, matrix)
    tests = (KtapResult(("net/a", "b c"), FAILED, "exit=1", "x\udc80\0"), KtapResult(("net/a", "b c"), SKIPPED, "", ""))
    run_cell(results, matrix, 0, CellFault.TEST, tests=tests)
    merge(results, tmp_path / "out")
    suite = Xml.parse(tmp_path / "out/junit.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), len(suite)) == ("4", "2", "1", 4)
    found = json.loads((tmp_path / "out/kcidb.json").read_text())["tests"]
    assert [(test["path"], test["status"]) for test in found] == [
        ("one", "PASS"), ("two", "FAIL"), ("two.net_a.b_c", "FAIL"), ("two.net_a.b_c", "SKIP")
    ]  # fmt: skip
    assert len({test["id"] for test in found}) == 4


def test_cell_that_ran_twice_has_the_worse_result_and_a_note(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "all/job-9/matrix-results"
    open_results(other, plan())
    run_cell(other, plan(), 0, CellFault.TEST)
    # It decides the one that was killed, and the one whose machine failed.
    run_cell(other, plan(), 3, CellFault.NONE)
    run_cell(other, plan(), 4, CellFault.NONE)
    merged = merge(results, tmp_path / "out")
    assert [cell.verdict for cell in merged.cells] == ["failed", "failed", "timed out", "passed", "passed", "missing"]
    notes = (tmp_path / "out/summary.md").read_text()
    assert notes.count("has 2 results, and") == 3


def edit(text: str, **values: object) -> str:
    return json.dumps({**json.loads(text), **values})


def test_damaged_results_are_missing_and_named(results: Path, tmp_path: Path) -> None:
    place = results / "job-0/matrix-results/000000/results.json"
    good = place.read_text()
    for text, words in (
        (good[:100], "has no results of a cell"),
        (good.replace('"schema": 1', '"schema": 7'), "is of form 7, and this vmkit reads form 1"),
        (good.replace('"number": 0', '"number": 1'), "has a result of another matrix"),
        (good.replace('"number": 0', '"number": -1'), "has a result of another matrix"),
        (edit(good, started=1e300), "started is 1e+300"),
        (edit(good, started=float("nan")), "started is nan"),
        (edit(good, seconds=float("inf")), "seconds is inf"),
        (edit(good, seconds=10**400), "has no results of a cell"),
        (edit(good, attempt=float("inf")), "has no results of a cell"),
        (edit(good, commands=[]), "it has ended, and a command has no result"),
        (edit(good, planned=[], commands=[]), "has a result of another matrix"),
    ):
        place.write_text(text)
        merged = merge(results, tmp_path / "out")
        assert merged.cells[0].verdict == "missing"
        assert [words in trouble for trouble in merged.troubles] == [True], merged.troubles
    place.unlink()
    assert merge(results, tmp_path / "out").troubles == ()


def test_fifo_among_the_results_is_missing_and_named(results: Path, tmp_path: Path) -> None:
    """Other hosts have written them. Its open would wait for a writer for ever."""
    folder = next((tmp_path / "all").rglob("000000"))
    (folder / "results.json").unlink()
    os.mkfifo(folder / "results.json")
    merged = merge_folders([results])
    assert merged.cells[0].verdict == "missing"
    assert [f"cannot read {folder}: it is no regular file" in trouble for trouble in merged.troubles] == [True]
    (tmp_path / "before").mkdir()
    os.mkfifo(tmp_path / "before" / "results.json")
    with pytest.raises(ConfigError, match="it is no regular file"):
        read_merged(tmp_path / "before")


def test_results_of_two_matrices_are_not_merged(results: Path, tmp_path: Path) -> None:
    open_results(results / "other", plan(2))
    with pytest.raises(ConfigError, match="have results of two matrices"):
        merge_folders([results])
    with pytest.raises(ConfigError, match="has no results of a matrix"):
        (tmp_path / "empty").mkdir()
        merge_folders([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="there is no directory"):
        merge_folders([tmp_path / "nowhere"])


def test_record_that_changes_while_it_is_merged_is_an_error(results: Path, tmp_path: Path) -> None:
    """It is read again for its texts, where not all texts fit into memory."""
    merged = merge_folders([results], kept_bytes=0)
    write_merged(merged, tmp_path / "same", "vmkit")
    merge(results, tmp_path / "kept")
    for path in (tmp_path / "same").iterdir():
        assert path.read_bytes() == (tmp_path / "kept" / path.name).read_bytes()
    run_cell(results / "job-4/matrix-results", plan(), 4, CellFault.NONE)
    with pytest.raises(HostError, match="has changed while it was merged"):
        write_merged(merged, tmp_path / "out", "vmkit")
    assert not list((tmp_path / "out").iterdir())


def test_changes_since_the_run_before_name_what_is_worse_first(results: Path, tmp_path: Path) -> None:
    merge(results, tmp_path / "before")
    run_cell(results / "job-3/matrix-results", plan(), 3, CellFault.NONE)
    other = tmp_path / "all/job-9/matrix-results"
    open_results(other, plan())
    run_cell(other, plan(), 0, CellFault.TEST)
    merged = merge(results, tmp_path / "after", tmp_path / "before")
    assert merged.changes is not None
    assert [(one.cell, one.before, one.after) for one in merged.changes] == [
        ("tiny/k0/auto", "passed", "failed"),
        ("tiny/k3/auto", "machine failed", "passed"),
    ]
    assert "tiny/k0/auto: passed before, failed now" in (tmp_path / "after/report.html").read_text()
    (tmp_path / "before/results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no result of `vmkit matrix merge`"):
        read_merged(tmp_path / "before")
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere/results.json"):
        read_merged(tmp_path / "nowhere")


def test_times_are_those_of_cells_that_ended(results: Path, tmp_path: Path) -> None:
    merge(results, tmp_path / "out")
    assert read_merged(tmp_path / "out")[1] == {"tiny/k0/auto": 2.0, "tiny/k1/auto": 3.0, "tiny/k2/auto": 4.0}


def make_plan(count: int) -> PlanRecord:
    return PlanRecord("digest", tuple(f"tiny/k{number}/auto" for number in range(count)), ("one",), is_fresh=False)


BASE = CellRecord("digest", 0, "", "tiny", "", "auto", "amd64", ("one",), "0.1.0", "host", 0.0)


def make_found(plan: PlanRecord, number: int, fault: CellFault | None, attempt: int, place: str) -> Found:
    record = replace(BASE, number=number, cell=plan.cells[number], attempt=attempt)
    if fault is not None:
        command = CommandRecord("one", VERDICTS[fault], fault, 1.0, "")
        record = replace(record, state="ended", seconds=1.0, commands=(command,))
    return Found(record, place, count_cases(record))


@pytest.mark.parametrize("clocks", [(0.0, 253_402_300_799.0), (253_402_300_799.0, 0.0)])
def test_clocks_of_nodes_decide_nothing_and_versions_that_differ_are_named(clocks: tuple[float, float]) -> None:
    plan = make_plan(2)
    found = [
        make_found(plan, 0, CellFault.TEST, 1, "a"),
        make_found(plan, 0, CellFault.NONE, 1, "b"),
        make_found(plan, 1, CellFault.NONE, 1, "b"),
    ]
    first, *others = (replace(one, record=replace(one.record, started=clocks[one.place == "b"])) for one in found)
    merged = merge_records(plan, [first, *others], {})
    assert [(cell.verdict, cell.seconds) for cell in merged.cells] == [("failed", 1.0), ("passed", 1.0)]
    assert list(list_notes(merged)) == ["tiny/k0/auto has 2 results, and a counts"]
    # Nodes that were not updated together.
    others = [replace(one, record=replace(one.record, vmkit="0.2.0")) for one in others]
    *_, note = list_notes(merge_records(plan, [first, *others], {}))
    assert note == "the cells are of different versions of vmkit: 0.1.0, 0.2.0"


def test_long_summary_is_cut() -> None:
    plan = make_plan(2000)
    text = render_markdown(merge_records(plan, [], {}))
    assert f"And {2000 - MAX_LISTED} more." in text and len(text) < 1 << 20


class Worker:
    """One job of an array on a node of its own. It can be killed at any point, and then it runs again."""

    def __init__(self, name: str, plan: PlanRecord, numbers: list[int], policy: Policy) -> None:
        self.name = name
        self._plan = plan
        self._numbers = numbers
        self._policy = policy
        # What is on its disk: the last record of each cell.
        self.disk: dict[int, Found] = {}
        self.ran: Counter[int] = Counter()

    def run(self, faults: dict[int, list[CellFault]], steps: int) -> bool:
        """Runs until it is done, or is killed after so many cells in the middle of one. faults: of the next tries."""
        schedule = Schedule(self._numbers, self._policy)
        while (number := schedule.take()) is not None:
            previous = self.disk.get(number)
            if previous is not None and previous.record.is_decided:
                schedule.finish(number, previous.record.fault)
                continue
            attempt = 1 if previous is None else previous.record.attempt + 1
            self.disk[number] = make_found(self._plan, number, None, attempt, self.name)
            if steps == 0:
                return False
            steps -= 1
            self.ran[number] += 1
            fault = faults[number].pop() if faults.get(number) else CellFault.NONE
            self.disk[number] = make_found(self._plan, number, fault, attempt, self.name)
            schedule.finish(number, fault)
        return True


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_no_cell_of_10000_on_100_workers_is_lost_or_counted_twice(seed: int) -> None:
    """Workers die at random, some for good; machines fail. Planning alone: the code of shards, jobs and merges."""
    dice, plan = Random(seed), make_plan(10_000)
    times = {name: dice.uniform(1, 60) for name in plan.cells if dice.random() < 0.9}
    shards = plan_shards(plan.cells, 100, times)
    workers = [Worker(str(index), plan, numbers, Policy(retries=2)) for index, numbers in enumerate(shards)]
    bad = [CellFault.TEST, CellFault.TIME, CellFault.MACHINE, CellFault.MACHINE]
    faults = {
        number: [dice.choice(bad) for _ in range(dice.randint(1, 4))] for number in dice.sample(range(10_000), 500)
    }
    dead = {worker.name for worker in workers if dice.random() < 0.05}
    for worker in workers:
        # An engine starts it again after each death, but for those that are dead for good.
        for _ in range(dice.randint(0, 3)):
            worker.run(faults, dice.randint(0, 80))
        if worker.name not in dead:
            assert worker.run(faults, 100_000)
    found = [one for worker in workers for one in worker.disk.values()]
    # A merge finds folders in any order, and some twice.
    found += dice.sample(found, min(len(found), 50))
    dice.shuffle(found)
    merged = merge_records(plan, found, {})
    assert [cell.number for cell in merged.cells] == list(range(10_000))
    assert sum(merged.counts.values()) == 10_000
    owners = {number: worker for worker, numbers in zip(workers, shards, strict=True) for number in numbers}
    for cell in merged.cells:
        last = owners[cell.number].disk.get(cell.number)
        assert cell.verdict == ("missing" if last is None else last.record.verdict)
        if owners[cell.number].name not in dead:
            assert cell.verdict not in ("missing", "killed")
    # A decided cell never ran again: it ran once more than its machines failed.
    for worker in workers:
        for number, count in worker.ran.items():
            assert count <= 1 + 4, (number, count)
    assert merged.cases.total() == 10_000
