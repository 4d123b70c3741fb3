"""A shared folder: `python -m tests.bench.shares [--rounds N]`.

In one guest on TCG, by FUSE over vsock: a large file written with fsync and read again by a fresh mount, and 2,000
files of 1,000 bytes made, listed with their attributes, read by a fresh mount and removed. The folder is in memory
where the host has /dev/shm. Prints medians and the worst, and judges nothing.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import vmkit
from vmkit.shares.place import SharedPlace
from vmkit.shares.start import open_share

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"
PLACE = "/mnt/bench"
FILES = 2000
LARGE_MB = 128
# Each prints its name, and seconds or MB/s.
FILL = f"""
import os, time
data = os.urandom(1 << 20)
t = time.monotonic()
with open("{PLACE}/large", "wb", 0) as file:
    for _ in range({LARGE_MB}):
        file.write(data)
    os.fsync(file.fileno())
print("write, MB/s", {LARGE_MB} / (time.monotonic() - t))
os.mkdir("{PLACE}/small")
t = time.monotonic()
for n in range({FILES}):
    with open("{PLACE}/small/%d" % n, "wb", 0) as file:
        file.write(data[:1000])
print("make {FILES} files, s", time.monotonic() - t)
"""
USE = f"""
import os, time
t = time.monotonic()
with open("{PLACE}/large", "rb", 0) as file:
    while file.read(1 << 20):
        pass
print("read, MB/s", {LARGE_MB} / (time.monotonic() - t))
t = time.monotonic()
for entry in os.scandir("{PLACE}/small"):
    entry.stat()
print("list {FILES} files with attributes, s", time.monotonic() - t)
t = time.monotonic()
for n in range({FILES}):
    with open("{PLACE}/small/%d" % n, "rb", 0) as file:
        file.read()
print("read {FILES} files, s", time.monotonic() - t)
t = time.monotonic()
for n in range({FILES}):
    os.unlink("{PLACE}/small/%d" % n)
print("remove {FILES} files, s", time.monotonic() - t)
"""


def measure(machine: vmkit.Machine) -> dict[str, float]:
    """One round, in a folder of its own."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    figures = {}
    with tempfile.TemporaryDirectory(dir=base) as folder:
        for script in (FILL, USE):
            with open_share(machine.name, SharedPlace(Path(folder), PLACE)):
                done = machine.run(["python3", "-c", script], text=True, check=True)
            for line in done.stdout.splitlines():
                name, _, figure = line.rpartition(" ")
                figures[name] = float(figure)
    return figures


def measure_shares(rounds: int) -> None:
    """All rounds in one machine."""
    with vmkit.Machine("tiny", accelerator="tcg", backend="user", memory="512M") as machine:
        found = [measure(machine) for _ in range(rounds)]
    for name in found[0]:
        figures = [one[name] for one in found]
        worst = min(figures) if name.endswith("MB/s") else max(figures)
        print(f"{name}: median {statistics.median(figures):.1f}, worst {worst:.1f}", flush=True)


def main() -> None:
    """Runs the rounds, and prints a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    os.environ[VARIABLE] = "off"
    measure_shares(words.rounds)


if __name__ == "__main__":
    main()
