"""Pools of real machines: each is taken once, is a machine of its own, and nothing is left, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

import vmkit as package
from tests.docs.schemas import check_form
from tests.guest.conftest import Run
from tests.vsh.live import wait_until
from vmkit.errors import MachineError
from vmkit.pool.pool import RunningPool, start_pool
from vmkit.pool.registry import pick_pool, read_pools
from vsh.registry import find_machine, read_machines

TIMEOUT_S = 120.0
OPTIONS = {"accelerator": "tcg", "backend": "user", "memory": "128M"}
# An owner that is killed inside its block, with a machine that it has taken.
OWNER = """
import sys, time, vmkit
with vmkit.Pool("tiny", size=1, name="lost", accelerator="tcg", backend="user", memory="128M") as pool:
    with pool.take(120) as machine:
        print(machine.name, flush=True)
        time.sleep(600)
"""


def fill(pool: RunningPool, size: int) -> tuple[str, ...]:
    wait_until(lambda: len(pool.status().waiting) == size, "the pool is full", TIMEOUT_S)
    return pool.status().waiting


def names() -> set[str]:
    return {machine.name for machine in read_machines()}


def has_ended(name: str) -> bool:
    return name not in names()


@pytest.fixture
def pool(own_registry: None) -> Iterator[package.Pool]:
    with package.Pool("tiny", size=2, name="p", **OPTIONS) as pool:
        yield pool
    assert read_pools() == []
    assert names() == set()


def test_each_machine_is_taken_once_and_is_its_own(pool: package.Pool) -> None:
    def use(_: int) -> tuple[str, ...]:
        with pool.take(TIMEOUT_S) as machine:
            asked = machine.run(["cat", "/proc/sys/kernel/random/boot_id", "/proc/sys/kernel/random/uuid"], text=True)
            name = machine.run(["hostname"], text=True).stdout.strip()
            assert name == machine.name
            offset = machine.measure_clock()
            assert abs(offset.ahead_ms) <= 50 + offset.error_ms
            return machine.name, *asked.stdout.split()

    with ThreadPoolExecutor(6) as threads:
        seen = list(threads.map(use, range(6)))
    words = [word for line in seen for word in line]
    assert len(set(words)) == len(words) == 3 * 6
    assert pool.status().taken == 6


def test_waiting_machine_is_nobody_elses(pool: package.Pool, vsh: Run, vmkit: Run) -> None:
    name = fill(pool, 2)[0]
    listed = json.loads(vmkit("list", "--json").stdout)
    check_form("machines", listed)
    assert {machine["state"] for machine in listed} == {"pooled"}
    done = vsh("--vm_name", name, "--", "true")
    assert done.returncode != 0
    assert b"is not ready: it is pooled\nhint: it waits in a pool" in done.stderr
    done = vmkit("resume", name)
    assert done.stderr == f"vmkit: cannot resume '{name}': '{name}' is pooled\nhint: vmkit pool take\n".encode()
    done = vmkit("up", "--reuse", "--name", name)
    assert b"is not ready: it is pooled\nhint: it waits in a pool" in done.stderr
    done = vmkit("pause", "--all")
    assert (done.returncode, done.stderr) == (0, b"")


def test_machine_that_ends_in_the_pool_is_replaced(pool: package.Pool, vmkit: Run) -> None:
    first, second = fill(pool, 2)
    assert vmkit("kill", first).returncode == 0
    wait_until(lambda: first not in pool.status().waiting, "the keeper has noticed")
    assert second in fill(pool, 2)
    with pool.take(TIMEOUT_S) as machine:
        assert machine.name == second
        os.kill(machine.find_entry().pid, signal.SIGKILL)
    assert find_machine(name=second) is None


def test_machine_that_its_client_has_left_ends(pool: package.Pool) -> None:
    for name in fill(pool, 2):
        monitor = find_machine(name=name)
        assert monitor is not None
        os.kill(monitor.pid, signal.SIGSTOP)
        # Its Take waits in the monitor's socket, and is answered after the client has left.
        with pytest.raises(MachineError, match=f"cannot take '{name}': the monitor does not answer"):
            pool.take(0.5)
        assert name not in pool.status().waiting
        os.kill(monitor.pid, signal.SIGCONT)
        wait_until(partial(has_ended, name), "the machine has ended", TIMEOUT_S)
    with pool.take(TIMEOUT_S) as machine:
        assert machine.run(["true"]).returncode == 0
    assert pool.status().taken == 1


def test_client_that_is_killed_leaves_no_machine(pool: package.Pool) -> None:
    name = fill(pool, 2)[0]
    monitor = find_machine(name=name)
    assert monitor is not None
    os.kill(monitor.pid, signal.SIGSTOP)
    with subprocess.Popen([sys.executable, "-m", "vmkit", "pool", "take", "p"]) as client:
        wait_until(lambda: name not in pool.status().waiting, "the machine is promised", TIMEOUT_S)
        client.kill()
    os.kill(monitor.pid, signal.SIGCONT)
    wait_until(partial(has_ended, name), "the machine has ended", TIMEOUT_S)
    assert pool.status().taken == 0


def test_keeper_that_is_killed_takes_the_waiting_machines_along(own_registry: None, vmkit: Run) -> None:
    done = vmkit("pool", "start", "--name", "k", "--size", "2", "--memory", "128M", "--accel", "tcg")
    assert done.returncode == 0, done.stderr.decode()
    taken = json.loads(vmkit("pool", "take", "--json").stdout)
    assert taken["state"] == "ready"
    os.kill(pick_pool("k").pid, signal.SIGKILL)
    wait_until(lambda: names() == {taken["name"]}, "the others have ended", TIMEOUT_S)
    assert read_pools() == []
    assert vmkit("pool", "status").stderr == b"no pool is running; start one: vmkit pool start\n"
    # Its name is free again, and the machine that runs keeps its own.
    done = vmkit("pool", "start", "--name", "k", "--size", "1", "--memory", "128M", "--accel", "tcg", "-q")
    assert done.returncode == 0, done.stderr.decode()
    assert len(names()) >= 2
    done = vmkit("down", "--all")
    assert done.stdout.startswith(b"k has ended\n")
    assert names() == set()


def test_keeper_that_hangs_is_ended_with_its_machines(pool: package.Pool, vmkit: Run) -> None:
    fill(pool, 2)
    os.kill(pick_pool("p").pid, signal.SIGSTOP)
    with pytest.raises(MachineError, match="the pool 'p' had no machine within"):
        pool.take(0.2)
    done = vmkit("down", "--all")
    assert (done.returncode, done.stdout) == (0, b"p has ended\n"), done.stderr
    assert names() == set()


def test_owner_that_is_killed_takes_everything_along(own_registry: None) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() in names()
        owner.kill()
    wait_until(lambda: not names() and not read_pools(), "pool and machine have ended", TIMEOUT_S)


def test_pool_whose_machines_cannot_start_says_why(own_registry: None, vmkit: Run) -> None:
    done = vmkit("pool", "start", "--name", "bad", "--accel", "tcg", "--append", "panic=-1 init=/none rdinit=/none")
    assert done.returncode != 0
    assert b"Traceback" not in done.stderr
    assert read_pools() == []
    assert names() == set()


def test_client_that_waits_gets_the_error_of_a_pool_that_makes_none(own_registry: None) -> None:
    spec = package.MachineSpec(snapshot="no-such", memory_mib=128)
    pool = RunningPool(start_pool(spec, size=1, name="none", owner=os.getpid()))
    try:
        for _ in range(2):
            with pytest.raises(MachineError, match="of the pool 'none' can be made: there is no snapshot 'no-such'"):
                pool.take(TIMEOUT_S)
    finally:
        pool.stop()
