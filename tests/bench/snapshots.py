"""`vmkit up` and then `vsh -- true`, whole processes: from a snapshot and by a boot, taking turns.

    python -m tests.bench.snapshots [ROUNDS]

Prints the medians of both and their ratio: of the wall time, and of QEMU's processor time, which a busy host changes
less. The snapshot is made first, and removed at the end.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BIN = Path(sys.executable).parent
OPTIONS = ("--accel", "tcg", "--backend", "user", "--memory", "128M")
NAME = "measured"
ROUNDS = 7


def run(program: str, *words: str) -> bytes:
    return subprocess.run([str(BIN / program), *words], check=True, capture_output=True).stdout


def read_cpu_s(pid: int) -> float:
    """The processor time of all threads of a process, in seconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def measure(*more: str) -> tuple[float, float, float]:
    """Seconds until ready, until the command has ended, and of QEMU's processor time."""
    start_s = time.monotonic()
    run("vmkit", "up", "tiny", *OPTIONS, "--name", NAME, "--quiet", *more)
    ready_s = time.monotonic()
    run("vsh", "--vm_name", NAME, "--", "true")
    end_s = time.monotonic()
    record = json.loads(run("vmkit", "status", NAME, "--json"))
    cpu_s = read_cpu_s(record["qemu_pid"])
    assert record["started_by"] == ("boot" if more else "snapshot")
    run("vmkit", "kill", NAME)
    return ready_s - start_s, end_s - start_s, cpu_s


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vmkit-") as runtime:
        os.environ["VMKIT_RUNTIME_DIR"] = runtime
        os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
        made = json.loads(run("vmkit", "snapshot", "make", "tiny", *OPTIONS, "--json", "--quiet"))
        rows: dict[str, list[tuple[float, float, float]]] = {"snapshot": [], "boot": []}
        for _ in range(rounds):
            rows["snapshot"].append(measure())
            rows["boot"].append(measure("--boot"))
        run("vmkit", "snapshot", "rm", made["name"])
        load = os.getloadavg()[0]
    medians = {how: [statistics.median(column) for column in zip(*seen, strict=True)] for how, seen in rows.items()}
    print(f"medians of {rounds}, load {load:.1f}; seconds")
    print(f"{'':10}{'up':>8}{'up+true':>10}{'QEMU CPU':>10}")
    for how, values in medians.items():
        print(f"{how:10}{values[0]:8.2f}{values[1]:10.2f}{values[2]:10.2f}")
    ratios = [medians["snapshot"][i] / medians["boot"][i] for i in range(3)]
    print(f"{'ratio':10}{ratios[0]:8.2f}{ratios[1]:10.2f}{ratios[2]:10.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
