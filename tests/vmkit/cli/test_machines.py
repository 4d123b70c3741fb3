"""list, status, wait, down, kill: what they say of running machines, and how they end."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import Vmkit
from vmkit.machine.registry import reserve
from vsh.registry import find_machine, read_machines


@pytest.fixture
def registered(folders: Path) -> Iterator[None]:
    """Two entries, `a` and `b`, whose monitor is this very process; nothing behind them answers."""
    record = {
        "backend": "user",
        "pid": os.getpid(),
        "image": "tiny",
        "accelerator": "tcg",
        "memory_mib": 256,
        "started": time.time() - 3700,
        "vsock": None,
    }
    with reserve("a", 3, "tiny", record), reserve("b", 44, "tiny", {**record, "started": None}):
        yield


def test_list_of_nothing_says_how_to_start(vmkit: Vmkit) -> None:
    done = vmkit("list")
    assert (done.status, done.out, done.err) == (0, "", "no machine is running; start one: vmkit up\n")
    assert json.loads(vmkit("list", "--json").out) == []


def test_list_is_a_table_that_a_pipe_does_not_cut(vmkit: Vmkit, registered: None) -> None:
    lines = vmkit("list").out.splitlines()
    assert lines[0].split() == ["NAME", "CID", "STATE", "IMAGE", "ACCEL", "BACKEND", "MEMORY", "UP"]
    assert lines[1].split() == ["a", "3", "starting", "tiny", "tcg", "user", "256", "MiB", "1h01m"]
    assert lines[2].split()[-1] == "?"


@pytest.mark.parametrize(
    ("image", "source", "shown"),
    [
        ("any", "/home/me/images/disk.img", "disk.img"),
        ("any", "docker://debian:stable", "docker://debian:stable"),
        ("any", "/home/me/odd\x1b[31m.img", "odd.img"),
        # A recipe for roots has a name of its own.
        ("lab", "/home/me/disk.img", "lab"),
        ("tiny", None, "tiny"),
    ],
)
def test_list_names_the_root_that_the_user_gave(
    vmkit: Vmkit, folders: Path, image: str, source: str | None, shown: str
) -> None:
    with reserve("a", 3, "tiny", {"backend": "user", "image": image, "source": source}):
        assert vmkit("list").out.splitlines()[1].split()[3] == shown


def test_list_in_json_has_the_record_and_the_directory(vmkit: Vmkit, registered: None, folders: Path) -> None:
    first, second = json.loads(vmkit("list", "--json").out)
    assert (first["name"], first["cid"], first["state"], first["schema"]) == ("a", 3, "starting", 1)
    assert second["directory"] == str(folders / "runtime" / "machines" / "b")


@pytest.mark.parametrize("word", ["b", "44"])
def test_status_takes_a_name_or_a_cid(vmkit: Vmkit, registered: None, word: str) -> None:
    shown = dict(line.split(None, 1) for line in vmkit("status", word).out.splitlines())
    assert (shown["name"], shown["cid"], shown["state"], shown["backend"]) == ("b", "44", "starting", "user")
    assert json.loads(vmkit("status", word, "--json").out)["name"] == "b"


@pytest.mark.parametrize("verb", ["status", "down", "kill", "wait", "console", "logs", "dmesg"])
def test_choice_of_machines_is_the_users(vmkit: Vmkit, registered: None, verb: str) -> None:
    done = vmkit(verb)
    assert (done.status, done.err) == (64, "vmkit: several machines are running: name one\nhint: a, b\n")


@pytest.mark.parametrize("verb", ["status", "down", "kill", "wait", "console", "logs", "dmesg"])
def test_no_machine_is_told_with_how_to_start_one(vmkit: Vmkit, verb: str) -> None:
    done = vmkit(verb)
    assert (done.status, done.err) == (1, "vmkit: no machine is running\nhint: start one: vmkit up\n")


@pytest.mark.parametrize("word", ["c", "45", "4" * 5000, "../a", "", "²"])
def test_unknown_machine_is_told_with_those_there_are(vmkit: Vmkit, registered: None, word: str) -> None:
    done = vmkit("status", word)
    assert done.status == 1
    assert done.err == f"vmkit: no machine named '{word}' is running\nhint: running: a, b\n"


def test_down_and_kill_of_all_of_nothing_is_done_at_once(vmkit: Vmkit) -> None:
    for verb in ("down", "kill"):
        done = vmkit(verb, "--all")
        assert (done.status, done.out, done.err) == (0, "", "")


def test_all_and_names_exclude_each_other(vmkit: Vmkit, registered: None) -> None:
    done = vmkit("down", "--all", "a")
    assert (done.status, done.err) == (64, "vmkit: give --all or names, not both\n")


def test_down_all_ends_every_machine(up: Vmkit, vmkit: Vmkit, folders: Path) -> None:
    up("ignore-power-off", "--name", "a")
    up("ignore-power-off", "--name", "b")
    done = vmkit("down", "--all", "--timeout", "0.1")
    assert done.status == 0, done.err
    assert done.out == "a is down\nb is down\n"
    assert done.err.count("the guest did not power off within 0.1 s: ending QEMU") == 2
    assert list((folders / "runtime" / "machines").iterdir()) == []


def test_machine_named_twice_ends_once(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "a", "--cid", "9")
    assert vmkit("kill", "a", "9", "a").out == "a is gone\n"


def test_machine_that_cannot_be_ended_keeps_no_other_running(
    up: Vmkit, vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process holds the entry `a`, so it stays when its monitor has gone."""
    monkeypatch.setattr("vmkit.machine.stop.KILL_DEADLINE_S", 0.1)
    monkeypatch.setattr("vmkit.machine.stop.NO_ANSWER_GRACE_S", 0.0)
    up("ready", "--name", "b")
    machine = find_machine(name="b")
    assert machine is not None
    with reserve("a", None, "tiny", {"pid": 2**22 + 1}):
        done = vmkit("kill", "--all")
    assert done.status == 1
    assert done.out == "b is gone\n"
    assert done.err.startswith("vmkit: 'a' does not end\n")
    with (
        reserve("a", None, "tiny", {"pid": 2**22 + 1}),
        reserve("c", None, "tiny", {"pid": 2**22 + 1}),
    ):
        done = vmkit("kill", "--all")
    assert done.err.startswith("vmkit: 2 machines did not end\n  'a' does not end; ")


@pytest.mark.parametrize(
    ("scenario", "status", "brief"),
    [
        ("ready-then-power-off", 0, "the guest powered off"),
        ("ready-then-die", 1, "QEMU ended with signal 9 (SIGKILL)"),
        ("ready-then-panic", 1, "the guest's kernel panicked: Fatal exception"),
    ],
)
def test_wait_says_why_a_machine_ended(up: Vmkit, vmkit: Vmkit, scenario: str, status: int, brief: str) -> None:
    up(scenario, "-q", "--name", "m")
    done = vmkit("wait", "m")
    assert (done.status, done.out) == (status, f"m: {brief}\n")


def test_wait_in_json_is_for_programs(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready-then-die", "-q", "--name", "m")
    done = vmkit("wait", "m", "--json")
    brief = "QEMU ended with signal 9 (SIGKILL)"
    assert json.loads(done.out) == {
        **{"name": "m", "reason": "qemu-exit", "brief": brief, "expected": False},
        "details": "",
    }
    assert done.status == 1


def test_wait_has_a_deadline(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m")
    done = vmkit("wait", "m", "--timeout", "0.05")
    assert (done.status, done.err) == (1, "vmkit: 'm' still runs after 0.05 s\n")
    assert len(read_machines()) == 1


def test_wait_hears_a_kill_and_calls_it_expected(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m")
    machine = find_machine(name="m")
    assert machine is not None
    threading.Timer(0.2, os.kill, (machine.pid, signal.SIGTERM)).start()
    done = vmkit("wait", "m", "--timeout", "20")
    assert (done.status, done.out) == (0, "m: a signal ended the monitor\n")


def test_wait_tells_a_monitor_that_was_killed(up: Vmkit, vmkit: Vmkit) -> None:
    up("ready", "--name", "m")
    machine = find_machine(name="m")
    assert machine is not None
    threading.Timer(0.2, os.kill, (machine.pid, signal.SIGKILL)).start()
    done = vmkit("wait", "m", "--timeout", "20")
    assert (done.status, done.out) == (1, "m: the monitor is gone\n")
