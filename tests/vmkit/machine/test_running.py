"""Machines that run, found from Python: list, find, wait, logs, console. QEMU is the fake one."""

import threading

import pytest

import vmkit
from tests.vmkit.machine.conftest import Boot
from vmkit.errors import ConfigError, MachineError
from vmkit.machine import stop
from vsh.registry import find_machine

DEADLINE_S = 20.0


def test_machines_are_listed_and_found(boot: Boot) -> None:
    boot("ready", name="a", cid=7)
    boot("ready", name="b", cid=8)
    assert [(machine.name, machine.cid) for machine in vmkit.list_machines()] == [("a", 7), ("b", 8)]
    assert vmkit.find_machine("b").cid == 8
    assert vmkit.find_machine(7).name == "a"
    assert vmkit.find_machine("a").record["state"] == "ready"
    with pytest.raises(ConfigError, match="several machines are running"):
        vmkit.find_machine()


def test_only_machine_needs_no_name(boot: Boot) -> None:
    boot("ready", name="a")
    assert vmkit.find_machine().name == "a"
    assert vmkit.find_machine().state == "ready"


def test_machine_that_is_missing_is_named(boot: Boot) -> None:
    with pytest.raises(MachineError, match="no machine is running"):
        vmkit.find_machine()
    boot("ready", name="a")
    with pytest.raises(MachineError, match="no machine named 'b'") as caught:
        vmkit.find_machine("b")
    assert caught.value.hint == "running: a"


def test_wait_returns_none_when_time_is_over_and_the_end_later(boot: Boot) -> None:
    boot("ready", name="a")
    assert vmkit.wait("a", timeout=0.05) is None
    machine = vmkit.find_machine("a")
    threading.Timer(0.1, machine.kill).start()
    ended = vmkit.wait("a", timeout=DEADLINE_S)
    assert ended is not None
    assert ended.expected


def test_ended_machine_is_not_taken_for_a_later_one(boot: Boot) -> None:
    boot("ready", name="a")
    machine = vmkit.find_machine("a")
    machine.kill()
    with pytest.raises(MachineError, match="not running any more"):
        machine.run(["true"])
    boot("ready", name="a")
    with pytest.raises(MachineError, match="not running any more"):
        machine.kill()


def test_logs_are_read_and_followed_to_the_end(boot: Boot) -> None:
    boot("ready", name="a")
    machine = vmkit.find_machine("a")
    assert b"ready" in machine.read_log("events")
    assert b"ready" in vmkit.logs("a", "events")
    pieces = machine.follow_log("events")
    assert b"ready" in next(pieces)
    entry = find_machine(name="a")
    assert entry is not None
    stop.kill(entry)
    assert isinstance(b"".join(pieces), bytes)


@pytest.mark.parametrize("kind", ["nonsense", "../machine.json"])
def test_log_of_no_kind_is_refused(boot: Boot, kind: str) -> None:
    boot("ready", name="a")
    with pytest.raises(ConfigError, match="no kind of log"):
        vmkit.logs("a", kind)


def test_console_is_a_connection(boot: Boot) -> None:
    boot("ready", name="a")
    with vmkit.find_machine("a").open_console() as console:
        console.settimeout(DEADLINE_S)
        console.sendall(b"x")
