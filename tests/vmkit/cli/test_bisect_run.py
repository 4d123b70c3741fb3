"""`vmkit bisect-run` in a machine whose QEMU is a fake and whose commands run on this host: the three statuses, and a
real `git bisect run`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import DEADLINE_S, Done, Vmkit
from vmkit.bisect import CommitVerdict, judge_loss, judge_start, judge_status, judge_tests
from vmkit.errors import MachineError
from vmkit.junit import CaseVerdict
from vmkit.ktap.results import KtapResult
from vsh.ending import Ending
from vsh.errors import ConnectionLost
from vsh.registry import read_machines

GOOD, BAD, SKIP = 0, 1, 125
Step = Callable[..., Done]


@pytest.fixture
def words(recipe: str) -> Callable[[str, str], list[str]]:
    """The words of a step whose QEMU plays that scenario, and whose command is a line for the shell."""

    def make(scenario: str, line: str, *options: str) -> list[str]:
        machine = ["--image", recipe, "--accel", "tcg", "--backend", "user", "--append", f"fake={scenario}"]
        return ["bisect-run", *machine, "--quiet", *options, "--", "sh", "-c", line]

    return make


@pytest.fixture
def step(words: Callable[..., list[str]], vmkit: Vmkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Step:
    """step("exit 3", "--ktap") runs a line in a fresh machine. $QEMU in the line is QEMU's pid."""
    monkeypatch.setenv("FAKE_PID_FILE", str(tmp_path / "qemu.pid"))

    def run(line: str, *options: str, scenario: str = "run-commands") -> Done:
        done = vmkit(*words(scenario, f"QEMU=$(cat {tmp_path}/qemu.pid); {line}", *options))
        assert read_machines() == []
        return done

    return run


@pytest.mark.parametrize(
    ("line", "status", "why"),
    [
        ("true", GOOD, "good: status 0"),
        ("exit 1", BAD, "bad: status 1"),
        ("kill -SEGV $$", BAD, "bad: signal 11 ended the command"),
        ("no-such-program", SKIP, "means that the command could not be run"),
        ("kill -USR1 $QEMU; exec sleep 1000", BAD, "the guest's kernel panicked: the test did it"),
        ("kill -KILL $QEMU; exec sleep 1000", SKIP, "QEMU ended with signal 9"),
    ],
)
def test_step_ends_with_what_git_takes(step: Step, line: str, status: int, why: str) -> None:
    done = step(line)
    assert (done.status, why in done.err) == (status, True), done.err


def test_outputs_of_the_command_are_those_of_the_step(step: Step) -> None:
    done = step("echo out; echo err >&2")
    assert (done.out, done.err) == ("out\n", "err\nvmkit: good: status 0\n")


def test_command_that_takes_too_long_is_bad(step: Step) -> None:
    done = step("exec sleep 1000", "--deadline", "2")
    assert (done.status, done.err) == (BAD, "vmkit: bad: the command did not end within 2 s\n")


@pytest.mark.parametrize(
    ("output", "status", "why"),
    [
        ("1..1\\nok 1 a\\n", GOOD, "good: 1 test: 1 passed"),
        ("1..2\\nok 1 a\\n", BAD, "bad: 2 tests: 1 passed, 1 error"),
        ("no results\\n", SKIP, "skip: the command printed no test results"),
    ],
)
def test_results_of_tests_count(step: Step, output: str, status: int, why: str) -> None:
    head = "" if "no results" in output else "KTAP version 1\\n"
    done = step(f"printf '{head}{output}'", "--ktap")
    assert (done.status, done.err) == (status, f"vmkit: {why}\n")
    # The output itself is there, too.
    assert done.out == f"{head}{output}".replace("\\n", "\n")


@pytest.mark.parametrize(("options", "status"), [((), SKIP), (("--boot-is-test",), BAD)])
def test_kernel_that_panics_in_its_boot(step: Step, options: tuple[str, ...], status: int) -> None:
    done = step("true", *options, scenario="panic")
    assert (done.status, "Unable to mount root fs" in done.err) == (status, True)


def test_machine_that_fails_in_a_boot_is_skipped(step: Step) -> None:
    assert step("true", "--boot-is-test", scenario="exit").status == SKIP


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "Missing argument 'COMMAND...'"),
        (("--bogus", "--", "true"), "No such option '--bogus'"),
        (("--cpus", "0", "--", "true"), "cpus must be"),
        (("--deadline", "soon", "--", "true"), "must be between"),
        (("--kernel", "/nonexistent", "--", "true"), "/nonexistent"),
        (("--image", "/nonexistent.toml", "--", "true"), "/nonexistent.toml"),
    ],
)
def test_wrong_option_is_no_bad_commit(vmkit: Vmkit, given: tuple[str, ...], message: str) -> None:
    done = vmkit("bisect-run", *given)
    assert (done.status, message in done.err) == (SKIP, True), done.err


def test_interruption_is_no_bad_commit(words: Callable[..., list[str]], folders: Path) -> None:
    argv = [sys.executable, "-m", "vmkit", *words("run-commands", "echo begun; exec sleep 1000")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (SKIP, b"vmkit: skip: interrupted\n")
    assert read_machines() == []


def test_statuses_of_commands() -> None:
    assert {status: judge_status(status).verdict for status in range(256)} == {
        status: CommitVerdict.GOOD
        if status == 0
        else CommitVerdict.SKIP
        if status in (125, 126, 127)
        else CommitVerdict.BAD
        for status in range(256)
    }


def test_start_is_judged_by_its_end() -> None:
    error = MachineError("did not start")
    for reason, verdict in (("panic", BAD), ("timeout", BAD), ("qemu-exit", SKIP), ("start-failed", SKIP), ("", SKIP)):
        ending = Ending({"brief": "x", "expected": False, "end": reason})
        assert judge_start(error, ending, boot_is_test=True).verdict == verdict
        assert judge_start(error, ending, boot_is_test=False).verdict == SKIP
    assert judge_start(error, None, boot_is_test=True).verdict == SKIP


def test_lost_session_is_judged_by_the_end_of_its_machine_or_by_its_silence() -> None:
    error = ConnectionLost("lost the connection")
    for reason, verdict in (("panic", BAD), ("reset", BAD), ("qemu-exit", SKIP), ("power-off", SKIP), ("", SKIP)):
        ending = Ending({"brief": "why", "expected": False, "end": reason})
        for is_hanging in (False, True):
            judgement = judge_loss(error, ending, is_hanging=is_hanging)
            assert (judgement.verdict, judgement.why) == (verdict, "why")
    assert judge_loss(error, None, is_hanging=True).verdict == BAD
    assert judge_loss(error, None, is_hanging=False).verdict == SKIP


def test_tests_are_judged_by_those_that_ran() -> None:
    results = {verdict: KtapResult(("a",), verdict, "", "") for verdict in CaseVerdict}
    passed, failed, error, skipped = (results[verdict] for verdict in CaseVerdict)
    assert judge_tests([skipped], has_found=True).verdict is CommitVerdict.SKIP
    assert judge_tests([skipped, passed], has_found=True).verdict is CommitVerdict.GOOD
    assert judge_tests([passed, failed], has_found=True).verdict is CommitVerdict.BAD
    assert judge_tests([passed, error], has_found=True).verdict is CommitVerdict.BAD


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_git_finds_the_commit_that_broke_it(recipe: str, folders: Path, tmp_path: Path) -> None:
    """Of eight commits, the third lets the machine fail, and from the sixth on the "kernel" is broken."""
    tree = tmp_path / "tree"
    tree.mkdir()
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for who in ("AUTHOR", "COMMITTER"):
        environ |= {f"GIT_{who}_NAME": "A", f"GIT_{who}_EMAIL": "a@example.com"}

    def git(*words: str) -> str:
        argv = ["git", "-C", str(tree), *words]
        done = subprocess.run(argv, env=environ, capture_output=True, timeout=4 * DEADLINE_S, check=False)
        assert done.returncode == 0, (words, done.stdout.decode(), done.stderr.decode())
        return done.stdout.decode() + done.stderr.decode()

    git("init", "-q")
    for number in range(1, 9):
        (tree / "kernel").write_text("broken\n" if number >= 6 else "fine\n")
        (tree / "scenario").write_text("exit\n" if number == 3 else "run-commands\n")
        (tree / "number").write_text(f"{number}\n")
        git("add", ".")
        git("commit", "-q", "-m", f"commit {number}")
    git("bisect", "start", "HEAD", "HEAD~7")
    own = [sys.executable, "-m", "vmkit", "bisect-run", "--image", recipe, "--accel", "tcg", "--backend", "user"]
    line = f'{" ".join(own)} --quiet --append "fake=$(cat scenario)" -- grep -q fine {tree}/kernel'
    log = git("bisect", "run", "sh", "-c", line)
    assert "commit 6" in log.partition("is the first bad commit")[2], log
    assert read_machines() == []
