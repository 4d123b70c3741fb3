"""READY of a root of a user's own against tiny's: `python -m tests.bench.own_root DISK [--rounds N]`.

Both boot in turn, on TCG, without snapshots. Prints medians and the smallest, and judges nothing.
"""

import argparse
import os
import statistics
from pathlib import Path

import vmkit


def boot(image: str) -> float:
    """Seconds until READY."""
    with vmkit.Machine(image, accelerator="tcg", backend="user", boot=True) as machine:
        return machine.started.seconds


def main() -> None:
    """Runs the rounds, and prints a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("disk", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
    sides: dict[str, list[float]] = {"tiny": [], str(words.disk.absolute()): []}
    for _ in range(words.rounds):
        for image, seconds in sides.items():
            seconds.append(boot(image))
    base = statistics.median(sides["tiny"])
    for image, seconds in sides.items():
        median = statistics.median(seconds)
        print(f"{Path(image).name}: median {median:.2f} s, min {min(seconds):.2f} s, {median / base:.2f} of tiny's")


if __name__ == "__main__":
    main()
