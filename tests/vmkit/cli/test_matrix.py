"""`vmkit matrix` with a QEMU that plays scenarios: reports, statuses, and that no machine is left."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.vmkit.cli.conftest import DEADLINE_S, Vmkit
from vmkit.junit import CaseVerdict
from vmkit.matrix.execute import CellResult, MatrixRun
from vmkit.matrix.plan import read_matrix
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
    done = vmkit("matrix", str(write_matrix("ready")), "--github")
    assert done.out == 'matrix={"include": [{"cell": "my/own/user"}, {"cell": "my/own/vhost"}]}\n'


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


def test_missing_file(vmkit: Vmkit) -> None:
    done = vmkit("matrix", "/nonexistent.toml")
    assert done.status == 64
    assert "cannot read the matrix /nonexistent.toml" in done.err
