"""A machine that is paused and resumed: its sessions live on, its clock is right, and each verb knows the state."""

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

import vmkit as package
from tests.docs.schemas import check_form
from tests.guest.conftest import Run
from vmkit.pool.pool import PooledMachine
from vsh.address import NotReady, address_of

# Of the clock after a resume, in milliseconds.
RIGHT_MS = 50.0
PAUSE_S = 3.0


@pytest.fixture
def machine(own_registry: None) -> Iterator[package.Machine]:
    with package.Machine("tiny", accelerator="tcg", backend="user", name="sleepy") as machine:
        yield machine


def check_clock(machine: PooledMachine) -> None:
    offset = machine.measure_clock()
    assert abs(offset.ahead_ms) <= RIGHT_MS + offset.error_ms


def test_sessions_and_clock_outlive_a_pause(built: None, vm: PooledMachine) -> None:
    with vm.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as session:
        assert session.stdin is not None
        assert session.stdout is not None
        session.stdin.write(b"before\n")
        session.stdin.flush()
        assert session.stdout.readline() == b"before\n"
        vm.pause()
        vm.pause()
        assert vm.state == "paused"
        session.stdin.write(b"meanwhile\n")
        session.stdin.flush()
        with pytest.raises(NotReady, match="is paused"):
            address_of(vm.find_entry())
        time.sleep(PAUSE_S)
        resumed = vm.resume()
        assert resumed.late_ms is not None
        assert resumed.late_ms >= PAUSE_S * 1000 - RIGHT_MS
        assert vm.state == "ready"
        assert session.stdout.readline() == b"meanwhile\n"
        session.stdin.close()
        assert session.wait(30) == 0
    check_clock(vm)
    # Time did not pass in the guest: a timer is as long as it was.
    assert float(vm.run(["cut", "-d ", "-f1", "/proc/uptime"], text=True).stdout) < 60


def test_clock_that_was_set_wrong_is_seen_and_mended(built: None, vm: PooledMachine, vmkit: Run) -> None:
    # The machine was taken a moment ago, and its monitor may still set the clock. This waits for that.
    vm.measure_clock()
    vm.run(["date", "-s", "2001-01-01 00:00"], check=True)
    assert vm.measure_clock().ahead_ms < -1e9
    done = vmkit("status", vm.name)
    assert b"ms behind the host's" in done.stdout
    for verb, words in (("pause", b"%s is paused\n"), ("resume", b"%s runs\n")):
        done = vmkit(verb, vm.name)
        assert (done.returncode, done.stdout, done.stderr) == (0, words % vm.name.encode(), b"")
    check_clock(vm)
    status = json.loads(vmkit("status", vm.name, "--json").stdout)
    check_form("machine", status)
    assert abs(status["clock"]["ahead_ms"]) <= RIGHT_MS + status["clock"]["error_ms"]


def test_verbs_know_a_paused_machine(machine: package.Machine, vmkit: Run, vsh: Run) -> None:
    assert vmkit("pause", "--all").returncode == 0
    listed = json.loads(vmkit("list", "--json").stdout)
    check_form("machines", listed)
    assert listed[0]["state"] == "paused"
    assert json.loads(vmkit("status", "--json").stdout)["clock"] is None
    done = vsh("--vm_name", "sleepy", "--", "true")
    assert done.returncode != 0
    assert done.stderr == b"vsh: machine 'sleepy' is not ready: it is paused\nhint: vmkit resume sleepy\n"
    assert b"Linux version" in vmkit("dmesg", "sleepy").stdout
    # The guest is asked, and powers off by itself.
    done = vmkit("down", "sleepy", "--timeout", "60")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"sleepy is down\n", b"")
