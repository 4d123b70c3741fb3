"""A pool and the pytest plugin: how soon a machine is there, what a waiting one costs, and what a test costs.

    python -m tests.bench.pool [take|waiting|first|pytest]

take: from the call of take() in a process that has imported vmkit to the first command's output, from a full pool.
waiting: memory and processor time of machines that wait. first: the first four tests with a fresh machine each, once
the pool of the run is full. pytest: 40 tests with a fresh machine and one command each.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vmkit
from vmkit.pool.pool import RunningPool
from vsh.registry import Entry, find_machine

OPTIONS = {"accelerator": "tcg", "backend": "user"}
SIZE = 8
ROUNDS = 3
WATCH_S = 20.0
TESTS = 40
SUITE = f"""
import pytest
pytestmark = pytest.mark.vm(accelerator="tcg", backend="user", memory="128M")

@pytest.mark.parametrize("number", range({TESTS}))
def test_one(vm, number):
    assert vm.run(["echo", "hi"], text=True).stdout == "hi\\n"
"""

FIRST = 4
# The module's machine starts the pool. The tests after it find as many machines as they take.
FIRST_SUITE = f"""
import time
import pytest
from vmkit.pool.pool import RunningPool
from vmkit.pool.registry import read_pools
pytestmark = pytest.mark.vm(accelerator="tcg", backend="user", memory="128M")


@pytest.fixture(scope="module", autouse=True)
def full(vm_module):
    (entry,) = read_pools()
    while len(RunningPool(entry).status().waiting) < {FIRST}:
        time.sleep(0.1)
    # What the last machine's start left to do.
    time.sleep(1)


@pytest.mark.parametrize("number", range({FIRST}))
def test_one(vm, number):
    assert vm.run(["echo", "hi"], text=True).stdout == "hi\\n"
"""


def fill(pool: RunningPool, size: int) -> tuple[str, ...]:
    while len((status := pool.status()).waiting) < size:
        assert not status.error, status.error
        time.sleep(0.1)
    return status.waiting


def measure_take() -> None:
    seen_s: list[float] = []
    with vmkit.Pool("tiny", size=SIZE, memory="128M", **OPTIONS) as pool:
        for _ in range(ROUNDS):
            fill(pool, SIZE)
            # What the last machine's end left to do.
            time.sleep(1)
            for _ in range(SIZE // 2):
                start_s = time.perf_counter()
                machine = pool.take()
                assert machine.run(["echo", "hi"]).stdout == b"hi\n"
                seen_s.append(time.perf_counter() - start_s)
                machine.kill()
    shown = " ".join(f"{one * 1000:.0f}" for one in seen_s)
    print(f"take to first output: median {statistics.median(seen_s) * 1000:.0f} ms of {len(seen_s)} ({shown})")


def measure_waiting() -> None:
    with vmkit.Pool("tiny", size=SIZE, memory="256M", **OPTIONS) as pool:
        entries = [entry for name in fill(pool, SIZE) if (entry := find_machine(name=name)) is not None]
        sizes_mib = [sum(map(read_pss_mib, find_processes(entry))) for entry in entries]
        before_s = sum(read_cpu_s(pid) for entry in entries for pid in find_processes(entry))
        time.sleep(WATCH_S)
        cpu_s = sum(read_cpu_s(pid) for entry in entries for pid in find_processes(entry)) - before_s
    print(f"a waiting machine of 256 MiB: {statistics.median(sizes_mib):.0f} MiB (QEMU, monitor, device; PSS)")
    print(f"processor time of {SIZE} waiting machines: {cpu_s * 1000 / WATCH_S:.1f} ms a second")


def run_suite(suite: str, *options: str) -> str:
    """The suite's output, with all durations."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_it.py").write_text(suite)
        argv = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "--durations=0", *options]
        return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout


def measure_first() -> None:
    rounds: list[list[float]] = []
    for _ in range(ROUNDS):
        shown = run_suite(FIRST_SUITE, f"--vm-pool={FIRST}")
        # The first test's set-up has the module's as well, which fills the pool.
        spent = [re.findall(rf"([0-9.]+)s (\w+) +\S+\[{number}\]", shown) for number in range(FIRST)]
        print(spent)
        rounds.append([sum(float(took_s) for took_s, _ in parts) for parts in spent])
    print(f"the first {FIRST} tests from a full pool: {rounds}")


def measure_pytest() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_it.py").write_text(SUITE)
        for workers in ([], ["-n", "2"]):
            argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", *workers]
            start_s = time.monotonic()
            shown = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout
            took_s = time.monotonic() - start_s
            setups_s = [float(one) for one in re.findall(r"([0-9.]+)s setup", shown)]
            print(
                f"{TESTS} tests, {' '.join(workers) or 'one process'}: {took_s:.1f} s, {took_s / TESTS:.2f} s a test; "
                f"getting a machine: median {statistics.median(setups_s):.2f} s, first {max(setups_s):.2f} s"
            )


def find_processes(entry: Entry) -> list[int]:
    """The monitor and its children."""
    children = Path(f"/proc/{entry.pid}/task/{entry.pid}/children").read_text().split()
    return [entry.pid, *map(int, children)]


def read_pss_mib(pid: int) -> float:
    """The process's memory, of shared pages its part."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.partition("Pss:")[2].split()[0]) / 1024


def read_cpu_s(pid: int) -> float:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


PARTS = {"take": measure_take, "waiting": measure_waiting, "first": measure_first, "pytest": measure_pytest}


def main(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="vmkit-") as runtime:
        os.environ["VMKIT_RUNTIME_DIR"] = runtime
        print(f"load {os.getloadavg()[0]:.1f}")
        for part in parts:
            PARTS[part]()


if __name__ == "__main__":
    main(sys.argv[1:] or list(PARTS))
