"""Ending machines: those that hang, those that have ended already, and never anybody else's process."""

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmkit.errors import MachineError
from vmkit.machine import stop
from vmkit.machine.registry import reserve
from vmkit.machine.start import Started
from vmkit.machine.stop import Control
from vmkit.machine.words import (
    MAX_ANSWER_LINE_BYTES,
    Answer,
    Ended,
    ExpectEnd,
    Quit,
    parse_request,
    render_answer,
    render_end,
)
from vsh.registry import Entry, find_machine, read_machines

Boot = Callable[..., Started]
END = b'{"end": "power-off", "brief": "the guest powered off", "expected": true}\n'


def find(name: str) -> Entry:
    machine = find_machine(name=name)
    assert machine is not None
    return machine


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """Somebody's process that has nothing to do with us."""
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def hanging(folders: Path) -> Iterator["subprocess.Popen[str]"]:
    """A monitor that holds its machine, takes every word and does nothing."""
    script = (
        "import os, signal, socket, time\n"
        "from vmkit.machine.registry import reserve\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with reserve('m', 9, 'tiny', {'pid': os.getpid(), 'vsock': None}) as r:\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    s.bind(str(r.directory / 'monitor.sock'))\n"
        "    s.listen()\n"
        "    from vmkit.machine.registry import write_record\n"
        "    write_record(r.directory, {'name': 'm', 'cid': 9, 'pid': os.getpid(), 'state': 'ready',\n"
        "                 'vsock': str(r.directory / 'vsock.sock')})\n"
        "    print('up', flush=True)\n"
        "    time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    for name in ("KILL_DEADLINE_S", "QUIT_DEADLINE_S", "MONITOR_GRACE_S", "NO_ANSWER_GRACE_S"):
        monkeypatch.setattr(stop, name, 0.1)


def test_entry_without_a_pid_costs_nobodys_life(folders: Path, short: None) -> None:
    """kill(2) with 0 means the caller's whole process group."""
    with reserve("m", 9, "tiny", {}), pytest.raises(MachineError, match="'m' does not end"):
        stop.kill(find("m"))
    assert read_machines() == []


def test_pid_that_is_somebody_elses_by_now_is_left_alone(
    folders: Path, short: None, sleeper: "subprocess.Popen[bytes]"
) -> None:
    with reserve("m", 9, "tiny", {"pid": sleeper.pid}):
        entry = find("m")
    for end in (stop.kill, stop.power_off):
        end(entry)
    assert sleeper.poll() is None


def test_later_machine_of_the_same_name_is_left_alone(
    folders: Path, short: None, sleeper: "subprocess.Popen[bytes]"
) -> None:
    with reserve("m", 9, "tiny", {"pid": 2**22 + 7}):
        entry = find("m")
    with reserve("m", 9, "tiny", {"pid": sleeper.pid}):
        stop.kill(entry)
        assert find("m").pid == sleeper.pid
    assert sleeper.poll() is None


@pytest.mark.parametrize("end", [stop.kill, lambda entry: stop.power_off(entry, timeout_s=0.1)])
def test_monitor_that_hangs_is_killed(
    hanging: "subprocess.Popen[str]", short: None, end: Callable[[Entry], None]
) -> None:
    end(find("m"))
    assert hanging.wait(10) == -signal.SIGKILL
    assert read_machines() == []


def test_monitor_that_is_stopped_is_killed(hanging: "subprocess.Popen[str]", short: None) -> None:
    hanging.send_signal(signal.SIGSTOP)
    stop.kill(find("m"))
    assert hanging.wait(10) == -signal.SIGKILL


def test_monitor_that_does_not_listen_is_killed(hanging: "subprocess.Popen[str]", short: None, folders: Path) -> None:
    (folders / "runtime" / "machines" / "m" / "monitor.sock").unlink()
    with pytest.raises(MachineError, match="the monitor of 'm' does not answer"):
        stop.wait_for_end(find("m"), 1.0)
    stop.power_off(find("m"), timeout_s=0.1)
    assert hanging.wait(10) == -signal.SIGKILL


def test_machine_that_has_ended_meanwhile_is_down(boot: Boot) -> None:
    boot("ready")
    entry = find("tiny")
    stop.kill(entry)
    stop.kill(entry)
    stop.power_off(entry)


def test_down_of_a_machine_that_is_starting_calls_the_start_off(
    boot: Boot, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "NO_ANSWER_GRACE_S", 0.1)
    caught: list[MachineError] = []

    def start() -> None:
        try:
            boot("silent")
        except MachineError as error:
            caught.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    end_s = time.monotonic() + 20
    while not read_machines():
        assert time.monotonic() < end_s
        time.sleep(0.005)
    started_s = time.monotonic()
    stop.power_off(find("tiny"), timeout_s=15)
    thread.join()
    assert time.monotonic() - started_s < 10, "it waited for a guest that could not be asked"
    assert "'tiny' did not start" in caught[0].brief or "the monitor" in caught[0].brief
    assert list((folders / "runtime" / "machines").iterdir()) == []


def test_two_downs_at_once_both_succeed(boot: Boot) -> None:
    boot("ignore-power-off")
    entry = find("tiny")
    threads = [threading.Thread(target=stop.power_off, args=(entry,), kwargs={"timeout_s": 0.2}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert read_machines() == []


def test_up_right_after_down_gets_the_name(boot: Boot) -> None:
    for _ in range(3):
        started = boot("ready", name="m")
        stop.kill(find("m"))
        assert started.monitor.poll() is not None


def wait_end(said: list[bytes], timeout_s: float | None = 5.0, *, close: bool = True) -> Ended | None:
    ours, theirs = socket.socketpair()

    def say() -> None:
        for piece in said:
            theirs.sendall(piece)
        if close:
            theirs.close()

    thread = threading.Thread(target=say)
    thread.start()
    with ours, contextlib.closing(theirs):
        ended = Control(ours).wait_end(timeout_s)
        ours.shutdown(socket.SHUT_RDWR)
    thread.join()
    return ended


POWER_OFF = Ended("power-off", "the guest powered off", True)


@pytest.mark.parametrize(
    "said",
    [
        [END],
        [END[index : index + 1] for index in range(len(END))],
        [b'{"ok": true}\n', END],
        [b'{"ok": true}\n' + END + b"more"],
        [b"nonsense\n[]\nnull\n{}\n" + b'{"end": "x"}\n', END],
        [b"\n\n\n", END],
        [b"[" * 5000 + b"\n", END],
    ],
)
def test_end_is_heard_however_it_is_said(said: list[bytes]) -> None:
    assert wait_end(said) == POWER_OFF


@pytest.mark.parametrize("said", [[], [END[:-5]], [b'{"ok": true}\n']])
def test_monitor_that_is_gone_is_an_end_nobody_expected(said: list[bytes]) -> None:
    assert wait_end(said) == Ended("monitor-gone", "the monitor is gone", expected=False)


def test_silence_ends_at_the_deadline() -> None:
    assert wait_end([b'{"ok": true}\n'], 0.05, close=False) is None
    assert wait_end([], 0.0, close=False) is None


def test_endless_line_costs_no_memory() -> None:
    ours, theirs = socket.socketpair()
    control = Control(ours)

    def flood() -> None:
        with contextlib.suppress(OSError):
            for _ in range(200):
                theirs.sendall(b"x" * 65536)
        theirs.close()

    thread = threading.Thread(target=flood)
    thread.start()
    assert control.wait_end(20.0) == Ended("monitor-gone", "the monitor is gone", expected=False)
    assert len(control._buffer) <= MAX_ANSWER_LINE_BYTES
    thread.join()
    ours.close()


def test_asking_a_monitor_that_has_gone_is_no_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    assert not Control(ours).ask(Quit()).ok
    ours.close()


def test_answer_of_a_monitor_is_returned_and_the_end_is_kept() -> None:
    ours, theirs = socket.socketpair()
    ended = Ended("panic", "it panicked", expected=False)
    theirs.sendall(render_answer(Answer(True, values={"a": 1})) + render_end(ended))
    control = Control(ours)
    assert control.ask(ExpectEnd()).values["a"] == 1
    assert parse_request(theirs.recv(100)) == ExpectEnd()
    assert control.wait_end(1.0) == ended
    assert not control.ask(ExpectEnd()).ok
    ours.close()
    theirs.close()
