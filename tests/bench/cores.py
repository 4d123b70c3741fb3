"""Core dumps of a guest's programs: `python -m tests.bench.cores [--rounds COUNT] [--megabytes COUNT]`.

Prints how long a core of 40 MB of a user's program takes from the crash until the host has it. Then it starts machines
with and without --cores, in turns, and prints the time to READY and the memory of our processes in the guest, each of
which counts its share of pages that it has in common with others (PSS). Judges nothing.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from vmkit.bench.testbed import plan_vsh
from vmkit.crashes.place import find_crashes_folder
from vmkit.crashes.store import list_of, remove
from vmkit.machine.machine import Machine
from vsh.address import find_by_name
from vsh.client import Client

NAME = "bench-cores"
WAIT_S = 120.0
POLL_S = 0.005
# Runs in the guest.
CRASH = """
import os, sys
data = os.urandom(4096) * (int(sys.argv[1]) * 256)
print("now", flush=True)
os.abort()
"""
MEMORY = """
import os
total = 0
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if b"vshd" in open(f"/proc/{pid}/cmdline", "rb").read() and int(pid) != os.getpid():
            rows = [line.split() for line in open(f"/proc/{pid}/smaps_rollup")]
            total += sum(int(row[1]) for row in rows if row[0] == "Pss:")
    except OSError:
        continue
print(total)
"""


def await_cores(machine: Machine) -> None:
    """Until the monitor has told that the guest gives its cores."""
    end_s = time.monotonic() + WAIT_S
    while '"event": "cores"' not in (machine.directory / "events.jsonl").read_text():
        if time.monotonic() > end_s:
            raise SystemExit("the guest gives no cores: see vmkit logs --kind events")
        time.sleep(POLL_S)


def time_core(machine: Machine, megabytes: int) -> tuple[float, int]:
    """Seconds from a program's last word until its core is kept, and the bytes of the core."""
    folder = find_crashes_folder()
    known = len(list_of(folder, machine.name))
    argv = [*plan_vsh(machine.name), "--user=user", "--", "python3", "-ISBc", CRASH, str(megabytes)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        started_s = time.perf_counter()
        while len(found := list_of(folder, machine.name)) == known:
            if time.perf_counter() - started_s > WAIT_S:
                raise SystemExit("the core did not come")
            time.sleep(POLL_S)
        seconds = time.perf_counter() - started_s
        process.wait()
    size = found[-1].core.stat().st_size
    remove(found[-1])
    return seconds, size


def read_ready(machine: Machine) -> float:
    """Seconds from the monitor's start to READY."""
    for line in (machine.directory / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "ready":
            return float(event["up"])
    raise SystemExit("the machine tells of no READY")


def say(what: str, values: list[float], unit: str) -> None:
    low, high = min(values), max(values)
    print(f"{what:46} median {statistics.median(values):8.3f} {unit} ({low:.3f} to {high:.3f})", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Core dumps of a guest's programs.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=40)
    options = parser.parse_args()
    ready: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, list[float]] = {True: [], False: []}
    seconds: list[float] = []
    for _ in range(options.rounds):
        for has_cores in (False, True):
            with Machine("tiny", name=NAME, accelerator="tcg", backend="user", boot=True, cores=has_cores) as machine:
                if has_cores:
                    await_cores(machine)
                ready[has_cores].append(read_ready(machine))
                client = Client(find_by_name(NAME))
                done = client.run(["python3", "-ISBc", MEMORY], check=True, text=True)
                memory[has_cores].append(int(done.stdout) / 1024)
                if has_cores:
                    taken_s, size = time_core(machine, options.megabytes)
                    seconds.append(taken_s)
    say(f"a core of {size / 1e6:.0f} MB, from the crash to the host", seconds, "s")
    for has_cores, word in ((False, "without"), (True, "with")):
        say(f"READY {word} --cores", ready[has_cores], "s")
        say(f"our processes in the guest {word} --cores", memory[has_cores], "MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
