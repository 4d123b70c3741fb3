"""vsh --multi: one command in several machines at once. Machines are registered here; each has a vshd of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.vsh.conftest import Register
from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, StartVshd, wait_for_end

Multi = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def machines(registry: Register, start_vshd: StartVshd) -> None:
    for cid, name in enumerate(("a", "b", "long-name"), 3):
        registry(name, cid, vsock=str(start_vshd().path))


@pytest.fixture
def multi(machines: None, runtime: Path) -> Iterator[Multi]:
    """multi("a,b", "true") starts vsh --multi."""
    started: list[subprocess.Popen[bytes]] = []

    def start(names: str, *words: str, flags: Sequence[str] = ()) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vsh", f"--multi={names}", *flags, "--", *words],
            cwd=CHECKOUT,
            env={**ENVIRONMENT, "VMKIT_RUNTIME_DIR": str(runtime)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def end(process: "subprocess.Popen[bytes]") -> tuple[int, list[str], list[str]]:
    """Status and sorted lines: which machine is first is chance."""
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, sorted(out.decode().splitlines()), sorted(err.decode().splitlines())


def test_output_has_the_machine_in_front_and_the_worst_status_wins(multi: Multi) -> None:
    # Nothing is read from our own stdin, which stays open.
    script = "cat; echo out; echo err >&2; printf rest; exit 2"
    assert end(multi("a,4,long-name", "sh", "-c", script)) == (
        2,
        sorted(f"{name}: {word}" for name in ("a", "4", "long-name") for word in ("out", "rest")),
        sorted(f"{name}: err" for name in ("a", "4", "long-name")),
    )


def test_machine_that_is_not_there_does_not_stop_the_others(multi: Multi) -> None:
    status, out, err = end(multi("a,nowhere,b", "echo", "ran"))
    assert (status, out) == (1, ["a: ran", "b: ran"])
    assert "nowhere: vsh: no machine named 'nowhere' is running" in err


def test_long_lines_come_in_parts_and_whole(multi: Multi) -> None:
    process = multi("a,b", "sh", "-c", "head -c 300000 /dev/zero | tr '\\0' x")
    out, _ = process.communicate(timeout=DEADLINE_S)
    for name in (b"a", b"b"):
        lines = [line for line in out.splitlines() if line.startswith(name + b": ")]
        assert sum(len(line) - 3 for line in lines) == 300_000


def test_commands_run_at_once(multi: Multi, tmp_path: Path) -> None:
    """Each waits for the other: one after another they would not end."""
    meet = f"cd {tmp_path}; touch $1; i=0; while [ ! -e $2 ]; do sleep 0.05; done"
    script = f"if mkdir {tmp_path}/first 2>/dev/null; then set -- x y; else set -- y x; fi; {meet}"
    assert end(multi("a,b", "sh", "-c", script)) == (0, [], [])


def test_signal_reaches_every_command(multi: Multi) -> None:
    process = multi("a,b", "sh", "-c", "trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    # What a client prints has passed its handlers of signals.
    assert {process.stdout.readline() for _ in range(2)} == {b"a: ready\n", b"b: ready\n"}
    process.send_signal(signal.SIGTERM)
    status, out, _ = end(process)
    assert status == 9
    assert [line for line in out if line.endswith("stopped")] == ["a: stopped", "b: stopped"]


def test_reader_that_leaves_ends_all(multi: Multi) -> None:
    process = multi("a,b", "sh", "-c", "while :; do echo line; sleep 0.01; done")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGPIPE


def test_command_that_ignores_term_ends_when_the_reader_has_left(multi: Multi) -> None:
    process = multi("a,b", "sh", "-c", "trap '' TERM HUP; echo $$; read x; while :; do echo line; sleep 0.05; done")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    process.stdout.close()
    assert process.wait(DEADLINE_S) == 128 + signal.SIGPIPE
    wait_for_end(pid)


def test_processes_of_a_killed_client_find_no_reader(multi: Multi) -> None:
    process = multi("a,b", "sh", "-c", "while :; do echo line; sleep 0.01; done")
    assert process.stdout is not None
    process.stdout.readline()
    children = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) == 2
    process.kill()
    process.wait(DEADLINE_S)
    for pid in children:
        wait_for_end(pid)


@pytest.mark.parametrize(
    ("names", "flags", "words", "complaint"),
    [
        ("a,", [], ["true"], "needs names of machines with commas between them, not 'a,'"),
        ("a,b,a", [], ["true"], "--multi has 'a' twice"),
        ("a,b", [], [], "--multi needs a command"),
        ("a,b", ["--cid=3"], ["true"], "--multi excludes --cid"),
        ("a,b", ["-t"], ["true"], "--multi excludes --tty"),
        ("a,b", ["--record=x"], ["true"], "--multi excludes --record"),
        (",".join(map(str, range(3, 300))), [], ["true"], "at most 256 machines, not 297"),
    ],
)
def test_wrong_use_is_refused(multi: Multi, names: str, flags: list[str], words: list[str], complaint: str) -> None:
    status, out, err = end(multi(names, *words, flags=flags))
    assert (status, out) == (64, [])
    assert any(complaint in line for line in err), err


def test_empty_stdin_leaves_ours_unread(start_vshd: StartVshd) -> None:
    """As ssh -n: in a loop that reads a list, the command must not eat the list."""
    vshd = start_vshd()
    reading, writing = os.pipe()
    os.write(writing, b"the list\n")
    os.close(writing)
    argv = [sys.executable, "-P", "-m", "vsh", f"--unix={vshd.path}", "-n", "--", "cat"]
    done = subprocess.run(
        argv, cwd=CHECKOUT, env=ENVIRONMENT, stdin=reading, capture_output=True, timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert os.read(reading, 100) == b"the list\n"
    os.close(reading)
