"""A shared folder: `python -m tests.bench.shares [--rounds COUNT] [--before FOLDER] [--cpu MODEL] [--nine]`.

In a guest on TCG, by FUSE over vsock: a large file written with fsync and read again by a fresh mount, and 2,000 files
of 1,000 bytes made, listed with their attributes, read by a fresh mount and removed. --megabytes and --files choose
other sizes. The folder is in memory where the host has /dev/shm. FOLDER is another checkout, and MODEL another
processor for the guest: each takes a turn in every round, in a guest of its own. --nine measures in a guest with the
kernel linux-image-amd64 instead, by FUSE and by 9P over vsock in turns. Prints medians and the worst, and judges
nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import vmkit
from vmkit.shares.place import SharedPlace
from vmkit.shares.start import open_share

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"
PLACE = "/mnt/bench"
# The kernel of the image tiny has no 9P.
STOCK = """extends = "tiny"
kernel = "linux-image-amd64"
modules_available = ["fuse", "9p", "9pnet_fd"]
"""
# Each gets the size of the large file in MiB and the number of files. Each prints its name, and seconds or MB/s.
FILL = """
import os, sys, time
large_mb, files = map(int, sys.argv[1:])
data = os.urandom(1 << 20)
t = time.monotonic()
with open("/mnt/bench/large", "wb", 0) as file:
    for _ in range(large_mb):
        file.write(data)
    os.fsync(file.fileno())
print("write, MB/s", large_mb / (time.monotonic() - t))
os.mkdir("/mnt/bench/small")
t = time.monotonic()
for n in range(files):
    with open("/mnt/bench/small/%d" % n, "wb", 0) as file:
        file.write(data[:1000])
print(f"make {files} files, s", time.monotonic() - t)
"""
USE = """
import os, sys, time
large_mb, files = map(int, sys.argv[1:])
t = time.monotonic()
with open("/mnt/bench/large", "rb", 0) as file:
    while file.read(1 << 20):
        pass
print("read, MB/s", large_mb / (time.monotonic() - t))
t = time.monotonic()
for entry in os.scandir("/mnt/bench/small"):
    entry.stat()
print(f"list {files} files with attributes, s", time.monotonic() - t)
t = time.monotonic()
for n in range(files):
    with open("/mnt/bench/small/%d" % n, "rb", 0) as file:
        file.read()
print(f"read {files} files, s", time.monotonic() - t)
t = time.monotonic()
for n in range(files):
    os.unlink("/mnt/bench/small/%d" % n)
print(f"remove {files} files, s", time.monotonic() - t)
"""


def measure(machine: vmkit.Machine, size: list[str], by: str = "fuse") -> dict[str, float]:
    """One round, in a folder of its own."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    figures = {}
    with tempfile.TemporaryDirectory(dir=base) as folder:
        for script in (FILL, USE):
            with open_share(machine.name, SharedPlace(Path(folder), PLACE), by):
                done = machine.run(["python3", "-c", script, *size], text=True, check=True)
            for line in done.stdout.splitlines():
                name, _, figure = line.rpartition(" ")
                figures[name] = float(figure)
    return figures


def measure_once(cpu: str | None, size: list[str]) -> dict[str, float]:
    """One round in a machine of its own."""
    with vmkit.Machine("tiny", accelerator="tcg", backend="user", memory="512M", cpu=cpu) as machine:
        return measure(machine, size)


def measure_transports(rounds: int, size: list[str]) -> None:
    """FUSE and 9P in turns, in one guest."""
    found: dict[str, list[dict[str, float]]] = {"fuse": [], "9p": []}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "stock.toml")
        recipe.write_text(STOCK)
        with vmkit.Machine(str(recipe), accelerator="tcg", backend="user", memory="512M") as machine:
            for _ in range(rounds):
                for by, figures in found.items():
                    figures.append(measure(machine, size, by))
    print_figures({"FUSE, ": found["fuse"], "9P beside it, ": found["9p"]})


def run_once(checkout: Path, cpu: str | None, size: list[str]) -> dict[str, float]:
    """One round with the programs of a checkout."""
    words = [sys.executable, "-m", "tests.bench.shares", "--once", "--megabytes", size[0], "--files", size[1]]
    done = subprocess.run([*words, *(["--cpu", cpu] if cpu else [])], cwd=checkout, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure_shares(rounds: int, size: list[str], kinds: dict[str, tuple[Path, str | None]]) -> None:
    """All rounds of all kinds, in turns."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, (checkout, cpu) in kinds.items():
            found[kind].append(run_once(checkout, cpu, size))
    print_figures(found)


def print_figures(found: dict[str, list[dict[str, float]]]) -> None:
    """A line for each figure of each kind."""
    for name in next(iter(found.values()))[0]:
        for kind, all_figures in found.items():
            figures = [one[name] for one in all_figures]
            worst = min(figures) if name.endswith("MB/s") else max(figures)
            print(f"{kind + name}: median {statistics.median(figures):.1f}, worst {worst:.1f}", flush=True)


def main() -> None:
    """Runs the rounds, and prints a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--cpu")
    parser.add_argument("--nine", action="store_true")
    parser.add_argument("--once", action="store_true", help="print one round as JSON")
    words = parser.parse_args()
    os.environ[VARIABLE] = "off"
    size = [str(words.megabytes), str(words.files)]
    if words.once:
        print(json.dumps(measure_once(words.cpu, size)))
        return
    if words.nine:
        measure_transports(words.rounds, size)
        return
    here = Path(__file__).parents[2]
    kinds: dict[str, tuple[Path, str | None]] = {"": (here, None)}
    if words.before is not None:
        kinds["before, "] = (words.before.resolve(), None)
    if words.cpu is not None:
        kinds[f"{words.cpu}, "] = (here, words.cpu)
    measure_shares(words.rounds, size, kinds)


if __name__ == "__main__":
    main()
