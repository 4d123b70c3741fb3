"""Large files of this host in a guest: `python -m tests.bench.share_reads [--rounds COUNT] [--megabytes SIZE]`.

In one guest on TCG, the same data by each transport of `vmkit share` and from a disk (virtio-blk), in turns: the first
reading of a new mount, and of a disk whose pages the guest has forgotten. Prints medians and the worst in MB/s, and the
median of each by that of the disk. --by names one transport. The data is in memory where the host has /dev/shm. If root
runs it, the folder is uid 1000's: virtiofsd never runs as root.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import vmkit
from vmkit.shares.place import SharedPlace
from vmkit.shares.start import open_share
from vmkit.shares.transports import NAMES

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"
PLACE = "/mnt/bench"
DISK = "disk"
USER = 1000
READ = """
import sys, time
path = sys.argv[1]
size = 0
with open("/proc/sys/vm/drop_caches", "w") as file:
    file.write("3")
t = time.monotonic()
with open(path, "rb", 0) as file:
    while data := file.read(1 << 20):
        size += len(data)
print(size / (1 << 20) / (time.monotonic() - t))
"""


def read(machine: vmkit.Machine, path: str) -> float:
    """Reads a file or a disk of the guest once, in MB/s."""
    return float(machine.run(["python3", "-c", READ, path], text=True, check=True).stdout)


def read_by(machine: vmkit.Machine, way: str, folder: Path) -> float:
    """The same of the folder's file by a new share, or of the disk."""
    if way == DISK:
        return read(machine, "/dev/vda")
    with open_share(machine.name, SharedPlace(folder, PLACE), way):
        return read(machine, f"{PLACE}/large")


def main() -> None:
    """Runs the rounds, and prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--by", choices=NAMES, action="append")
    words = parser.parse_args()
    os.environ[VARIABLE] = "off"
    ways = [DISK, *(words.by or NAMES)]
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    figures: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=base) as made:
        folder = Path(made)
        large = folder / "large"
        with large.open("wb") as file:
            for _ in range(words.megabytes):
                file.write(os.urandom(1 << 20))
        if os.geteuid() == 0:
            for path in (folder, large):
                os.chown(path, USER, USER)
        options = {"accelerator": "tcg", "backend": "user", "memory": "512M", "disks": [large]}
        with vmkit.Machine("tiny", **options) as machine:  # type: ignore[arg-type]  # of several types
            for number in range(words.rounds + 1):
                for way in ways:
                    figure = read_by(machine, way, folder)
                    # The first round translates the guest's code.
                    if number:
                        figures[way].append(figure)
    of_disk = statistics.median(figures[DISK])
    for way, found in figures.items():
        median = statistics.median(found)
        print(f"{way}: median {median:.0f} MB/s, worst {min(found):.0f}, by that of the disk {median / of_disk:.2f}")


if __name__ == "__main__":
    main()
