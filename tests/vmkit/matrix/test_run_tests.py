"""A command of a matrix that prints test results: the cases of it and its tests, also when it breaks off."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast
from xml.etree import ElementTree as Xml

import pytest

from tests.vsh.live import DEADLINE_S, Vshd
from vmkit.errors import ConfigError, MachineError
from vmkit.junit import CaseVerdict
from vmkit.machine.machine import Machine
from vmkit.matrix import execute
from vmkit.matrix.execute import ResultKeeper, keep_machine_logs, run_tests
from vmkit.matrix.outputs import KtapSink, Tail
from vmkit.matrix.plan import Cell, GuestCommand, plan_matrix
from vmkit.matrix.report import render_report, render_rows
from vmkit.matrix.results import CellFault, CellResult
from vsh.address import Address
from vsh.client import Client

PASSED, FAILED, ERROR, _ = CaseVerdict


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = Vshd(tmp_path_factory.mktemp("vshd"))
    yield Client(Address.unix(str(server.path)))
    assert server.stop() == 0, server.log


def run(client: Client, line: str, timeout_s: float = DEADLINE_S) -> CellResult:
    command = GuestCommand("selftest", ("sh", "-c", line), has_ktap=True)
    return run_tests(Cell("tiny", None, "user", (command,)), lambda: client, command, timeout_s)


def test_subtests_are_cases_behind_their_command(client: Client) -> None:
    result = run(client, r"printf 'TAP version 13\n1..2\nok 1 a\nnot ok 2 b # exit=1\n'; echo a word >&2")
    assert (result.verdict, result.brief) == (FAILED, "2 tests: 1 passed, 1 failed")
    assert render_rows([result])[0][5] == "failed: 2 tests: 1 passed, 1 failed"
    suite = Xml.fromstring(render_report([result]))[0]
    assert [(case.get("classname"), case.get("name")) for case in suite] == [
        ("tiny.own.user", "selftest"), ("tiny.own.user.selftest", "a"), ("tiny.own.user.selftest", "b")
    ]  # fmt: skip
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    assert suite[2][0].get("message") == "exit=1"
    assert "not ok 2 b" in str(suite[0][0].text) and "a word" in str(suite[0][0].text)


def test_command_passes_when_all_its_tests_do(client: Client) -> None:
    result = run(client, r"printf 'KTAP version 1\n1..2\nok 1 a\nok 2 b # SKIP no\n'")
    assert (result.verdict, len(result.tests), result.fault) == (PASSED, 2, CellFault.NONE)


def test_status_of_a_command_counts_beside_its_tests(client: Client) -> None:
    result = run(client, r"printf 'KTAP version 1\n1..1\nok 1 a\n'; exit 3")
    assert (result.verdict, result.brief) == (FAILED, "status 3, 1 test: 1 passed")
    assert result.fault is CellFault.TEST


def test_command_that_hangs_is_an_error(client: Client) -> None:
    result = run(client, "exec sleep 1000", timeout_s=0.5)
    assert (result.verdict, result.brief, result.tests) == (ERROR, "the command did not end in time", ())
    assert result.fault is CellFault.TIME


def test_output_that_breaks_off_has_the_results_until_then() -> None:
    tail = Tail(1000)
    sink = KtapSink(tail)
    for piece in (b"KTAP version 1\n1.", b".3\nok 1 a\nbegins", b" b\n"):
        assert sink.write([memoryview(piece)]) == len(piece)
    tests = sink.finish("the command did not end in time")
    assert [(test.path[0], test.verdict, test.brief) for test in tests] == [
        ("a", PASSED, ""),
        ("test 2", ERROR, "was running when the output ended: the command did not end in time"),
        ("test 3", ERROR, "did not run"),
    ]
    assert tests[1].log == "begins b" and tail.read().endswith(b"begins b\n")


def test_tail_is_the_end_of_what_was_written() -> None:
    tail = Tail(10)
    for number in range(100):
        tail.add(b"%02d" % number)
    assert tail.read() == b"9596979899"


def test_command_that_dies_has_the_results_until_then(client: Client) -> None:
    result = run(client, r"printf 'KTAP version 1\n1..2\nok 1 a\n'; kill -SEGV $$")
    assert (result.verdict, result.brief) == (FAILED, "status 139, 2 tests: 1 passed, 1 error")


def test_command_without_results_is_an_error(client: Client) -> None:
    assert (run(client, "echo hello").verdict, run(client, "true").brief) == (ERROR, "it printed no test results")
    assert run(client, "exit 2").brief == "it printed no test results, status 2"


def test_machine_that_is_gone_has_no_results() -> None:
    def fail() -> Client:
        raise MachineError("'m' is not running any more: the guest's kernel panicked: x")

    command = GuestCommand("selftest", ("true",), has_ktap=True)
    result = run_tests(Cell("tiny", None, "user", (command,)), fail, command, DEADLINE_S)
    assert (result.verdict, result.tests, result.fault) == (ERROR, (), CellFault.MACHINE)
    assert result.brief == "'m' is not running any more: the guest's kernel panicked: x"


def test_matrix_file_names_the_commands_with_results() -> None:
    raw = {"commands": {"a": "true", "b": "true"}}
    path = Path("/lab/lab.toml")
    assert [command.has_ktap for command in plan_matrix(raw, path).cells[0].commands] == [False, False]
    commands = plan_matrix({**raw, "ktap": ["b"]}, path).cells[0].commands
    assert [command.has_ktap for command in commands] == [False, True]
    with pytest.raises(ConfigError, match="ktap: there is no command 'c'"):
        plan_matrix({**raw, "ktap": ["c"]}, path)
    with pytest.raises(ConfigError, match="ktap: must be a list"):
        plan_matrix({**raw, "ktap": True}, path)


class LateMachine:
    """A machine whose vshd is slow to write the line of a session, and whose kernel keeps three lines."""

    name = "late"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[bytes] = []
        self.late = 0
        self.looks = 0

    def run(self, command: bytes, late: int) -> None:
        """A session, whose line comes after so many looks."""
        self.lines.append(command)
        self.late = late

    def read_log(self, kind: str) -> bytes:
        assert kind == "sessions"
        self.looks += 1
        self.late -= 1
        written = self.lines[:-1] if self.late > 0 else self.lines
        return b"".join(line + b"\n" for line in written[-3:])


class Kept:
    """What a cell's folder is asked to keep."""

    def __init__(self, machine: LateMachine) -> None:
        self.machine = machine
        self.kept: list[bytes] = []

    def keep_logs(self, source: Path) -> None:
        assert source == self.machine.directory
        self.kept.append(self.machine.read_log("sessions"))


def test_logs_are_kept_when_they_have_the_line_of_each_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "LINE_PERIOD_S", 0.001)
    monkeypatch.setattr(execute, "SESSION_LINE_S", DEADLINE_S)
    machine = LateMachine(tmp_path)
    keeper = Kept(machine)
    session = keep_machine_logs(cast(Machine, machine), cast(ResultKeeper, keeper))
    for number in range(5):
        machine.run(b"%d" % number, late=3)
        session = keep_machine_logs(cast(Machine, machine), cast(ResultKeeper, keeper), session)
    # The kernel has lost the first two by then, and nobody waits for these.
    assert keeper.kept == [b"", b"0\n", b"0\n1\n", b"0\n1\n2\n", b"1\n2\n3\n", b"2\n3\n4\n"]
    assert machine.looks == 2 + 5 * 4
