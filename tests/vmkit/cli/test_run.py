"""`vmkit run` in a machine whose QEMU is a fake and whose commands run on this host: streams, statuses, signals, and
that nothing stays, however it ends.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import DEADLINE_S, Done, Vmkit
from tests.vsh.live import is_alive, read_line, wait_for_end, wait_until
from tests.vsh.typist import Typist
from vsh.registry import find_machine, read_machines

# docker's.
FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127
Argv = Callable[..., list[str]]


@pytest.fixture
def argv(recipe: str) -> Argv:
    """The program's words for a command: argv("ls", options=("-i",))."""

    def make(*words: str, options: tuple[str, ...] = (), scenario: str = "run-commands") -> list[str]:
        machine = ("--accel", "tcg", "--backend", "user", "--append", f"fake={scenario}")
        return [sys.executable, "-m", "vmkit", "run", *machine, *options, recipe, *words]

    return make


@pytest.fixture
def run(argv: Argv, folders: Path) -> Iterator[Callable[..., Done]]:
    """run("ls") runs the program to its end, after which no machine is there."""

    def start(*words: str, stdin: bytes = b"", **options: str | tuple[str, ...]) -> Done:
        done = subprocess.run(
            argv(*words, **options), input=stdin, capture_output=True, timeout=DEADLINE_S, check=False
        )
        assert read_machines() == []
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    yield start
    # Its place in the registry, too.
    assert list((folders / "runtime/machines").glob("*")) == []


Run = Callable[..., Done]


def test_streams_and_status_are_the_commands(run: Run) -> None:
    done = run("sh", "-c", "echo out; echo err >&2; exit 7")
    # Not a line of ours.
    assert (done.status, done.out, done.err) == (7, "out\n", "err\n")
    assert run("--", "sh", "-c", "kill -TERM $$").status == 128 + signal.SIGTERM


def test_stdin_is_the_commands_only_where_it_is_asked_for(run: Run) -> None:
    assert run("cat", stdin=b"not for it\n").out == ""
    assert run("cat", stdin=b"for it\n", options=("-i",)).out == "for it\n"
    # Its end is the command's.
    assert run("sh", "-c", "cat; echo end", options=("-i",)).out == "end\n"


def test_words_behind_source_are_the_commands(run: Run) -> None:
    assert run("echo", "-i", "--memory", "--", "-e").out == "-i --memory -- -e\n"
    done = run("--memory", "512")
    assert (done.status, done.err.splitlines()[-1]) == (
        NOT_FOUND,
        "hint: options of vmkit stand before SOURCE: vmkit run --memory SOURCE",
    )


def test_variables_directory_and_entry_point(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "passed on")
    (tmp_path / "env").write_text("A=file\nB=file\n")
    options = ("--env-file", f"{tmp_path}/env", "-e", "A=option", "-e", "FROM_HERE", "-e", "HOME=/nonexistent")
    line = 'echo "$A,$B,$FROM_HERE,$HOME"; pwd'
    done = run("-c", line, options=(*options, "-w", str(tmp_path), "--entrypoint", "sh", "--rm"))
    assert done.out.splitlines() == ["option,file,passed on,/nonexistent", str(tmp_path)], done.err


def test_directory_that_is_missing_is_made(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    assert run("pwd", options=("-w", str(folder))).out == f"{folder}\n"
    (tmp_path / "file").write_text("")
    done = run("pwd", options=("-w", f"{tmp_path}/file/x"))
    assert (done.status, "cannot change to directory" in done.err) == (FAILED, True), done.err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_user_is_a_name_or_numbers(run: Run) -> None:
    assert run("sh", "-c", "id -u; id -G", options=("-u", "5:6")).out == "5\n6\n"
    done = run("true", options=("-u", "nosuchuser"))
    assert (done.status, "could not find user: nosuchuser" in done.err) == (FAILED, True), done.err


def test_command_that_cannot_run_has_dockers_status(run: Run, tmp_path: Path) -> None:
    assert run("no-such-program").status == NOT_FOUND
    assert run("/nonexistent/program").status == NOT_FOUND
    (tmp_path / "text").write_text("text\n")
    done = run(str(tmp_path / "text"))
    assert (done.status, "Permission denied" in done.err) == (NOT_EXECUTABLE, True), done.err
    assert run("/").status == NOT_EXECUTABLE


@pytest.mark.parametrize(
    ("scenario", "seen"),
    [
        ("panic", "Unable to mount root fs"),
        ("exit", "QEMU ended with status 3"),
        ("init-error", "cannot mount /dev"),
    ],
)
def test_machine_that_fails_is_125(run: Run, scenario: str, seen: str) -> None:
    done = run("true", scenario=scenario)
    assert (done.status, seen in done.err) == (FAILED, True), done.err


def test_machine_that_ends_under_the_command_is_125(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PID_FILE", str(tmp_path / "qemu.pid"))
    done = run("sh", "-c", f"kill -USR1 $(cat {tmp_path}/qemu.pid); exec sleep 1000")
    assert (done.status, "the guest's kernel panicked: the test did it" in done.err) == (FAILED, True), done.err


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ((), "Missing argument 'SOURCE'"),
        (("--bogus", "tiny"), "No such option '--bogus'"),
        (("--cpus", "0", "tiny", "true"), "--cpus must be between 1 and 255, not 0"),
        (("--name", "a/b", "tiny", "true"), "'a/b' cannot be a machine's name"),
        (("-e", "=b", "tiny", "true"), "--env must be NAME=VALUE or NAME, not '=b'"),
        (("-w", "here", "tiny", "true"), "--workdir must be an absolute path, not 'here'"),
        (("--env-file", "/nonexistent", "tiny", "true"), "cannot read --env-file /nonexistent"),
        (("-i", "-", "true"), "standard input is the archive"),
        (("./nonexistent", "true"), "there is no root or recipe"),
        (("nonexistent", "true"), "nonexistent"),
    ],
)
def test_wrong_words_are_125_and_start_nothing(vmkit: Vmkit, words: tuple[str, ...], seen: str) -> None:
    done = vmkit("run", *words)
    assert (done.status, seen in done.err) == (FAILED, True), done.err


def test_terminal_needs_one(vmkit: Vmkit) -> None:
    """As docker has it, in its words."""
    done = vmkit("run", "-it", "tiny", "true")
    assert (done.status, done.err.splitlines()[0]) == (FAILED, "vmkit: the input device is not a TTY")


def test_command_has_a_terminal_without_input(run: Run) -> None:
    assert run("sh", "-c", "tty; stty size", options=("-t",)).out.splitlines()[1:] == ["24 80"]


def test_person_types_into_the_command(argv: Argv, folders: Path) -> None:
    typist = Typist(argv("sh", "-c", "stty size; read x; echo got $x", options=("-it", "-q")), env=dict(os.environ))
    try:
        typist.expect(b"30 100")
        typist.type(b"this\r")
        typist.expect(b"got this")
        assert typist.wait() == 0
    finally:
        typist.close()
    assert read_machines() == []


def test_name_that_is_taken(argv: Argv, up: Vmkit) -> None:
    up("ready", "-q", "--name", "mine")
    done = subprocess.run(
        argv("true", options=("--name", "mine")), capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, b"'mine'" in done.stderr) == (FAILED, True), done.stderr
    (machine,) = read_machines()
    assert machine.name == "mine"
    os.kill(machine.pid, signal.SIGTERM)
    wait_for_end(machine.pid)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(argv: Argv, folders: Path) -> Iterator[Start]:
    """start("sleep", "9") is the running program with pipes; its command has begun when it prints a line."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*words: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            argv(*words, options=options), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_two_at_once_are_two_machines(start: Start) -> None:
    one, two = (start("sh", "-c", "echo here; cat", options=("-i",)) for _ in range(2))
    for process in (one, two):
        assert process.stdout is not None and read_line(process.stdout) == "here"
    assert len(read_machines()) == 2
    for process, text in ((one, b"one"), (two, b"two")):
        assert process.communicate(text, timeout=DEADLINE_S)[0] == text
        assert process.returncode == 0
    assert read_machines() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_is_the_commands(start: Start, number: signal.Signals) -> None:
    process = start("sh", "-c", f"trap 'echo caught; exit 3' {number:d}; echo here; while :; do sleep 0.05; done")
    assert process.stdout is not None and read_line(process.stdout) == "here"
    process.send_signal(number)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (3, b"caught\n")
    assert read_machines() == []


def test_third_signal_ends_a_command_that_goes_on(start: Start) -> None:
    """As docker does, but that docker leaves the container."""
    line = "trap 'echo caught' INT TERM; echo here; while :; do sleep 0.05; done"
    process = start("sh", "-c", line)
    assert process.stdout is not None and read_line(process.stdout) == "here"
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
        assert read_line(process.stdout) == "caught"
    # It counts for nothing.
    process.send_signal(signal.SIGWINCH)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, b"3 signals came" in err) == (128 + signal.SIGINT, True), err
    assert read_machines() == []


def test_signal_that_ends_the_command_is_the_status(start: Start) -> None:
    process = start("sh", "-c", "echo here; exec sleep 1000")
    assert process.stdout is not None and read_line(process.stdout) == "here"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert read_machines() == []


def test_kill_leaves_nothing(start: Start, folders: Path) -> None:
    process = start("sh", "-c", "echo here $$; exec sleep 1000")
    assert process.stdout is not None
    pid = int(read_line(process.stdout).split()[1])
    (machine,) = read_machines()
    process.kill()
    process.wait(DEADLINE_S)
    wait_for_end(machine.pid)
    wait_for_end(pid)
    assert not is_alive(pid)
    assert find_machine(name=machine.name) is None
    assert list((folders / "runtime/machines").glob("*")) == []


def test_reader_that_leaves_ends_the_command(start: Start) -> None:
    process = start("yes")
    assert process.stdout is not None
    assert read_line(process.stdout) == "y"
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGPIPE
    assert process.stderr is not None and process.stderr.read() == b""
    assert read_machines() == []


def test_interruption_of_a_start_leaves_nothing(argv: Argv, folders: Path) -> None:
    machines = folders / "runtime/machines"
    with subprocess.Popen(argv("true", scenario="silent"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: list(machines.glob("*/qmp.log")), "a machine that starts")
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert list(machines.glob("*")) == []
