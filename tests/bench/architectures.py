"""READY of each architecture against amd64's.

    python -m tests.bench.architectures [--rounds N] [--only NAME] [--image IMAGE]

All boot `tiny`, or another image, in turn, under TCG, without snapshots. Prints medians, the slowest and the failures,
and judges nothing.
"""

import argparse
import os
import shutil
import statistics
import sys

import vmkit
from vmkit.architectures import ARCHITECTURES, HOST
from vsh.errors import VshError


def boot(image: str, name: str) -> float:
    """Seconds until READY. A command proves that the guest serves. Raises VshError."""
    with vmkit.Machine(image, arch=name, accelerator="tcg", backend="user", boot=True) as machine:
        machine.run(["true"], check=True)
        return machine.started.seconds


def main() -> None:
    """Runs the rounds, and prints a line for each architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", action="append", choices=[name for name in ARCHITECTURES if name != HOST])
    parser.add_argument("--image", default="tiny")
    words = parser.parse_args()
    os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
    there = [name for name, row in ARCHITECTURES.items() if shutil.which(row.qemu)]
    names = [name for name in there if name == HOST or not words.only or name in words.only]
    for name in names:
        # Not measured: it may build the image.
        boot(words.image, name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures = dict.fromkeys(names, 0)
    for _ in range(words.rounds):
        for name in names:
            try:
                seconds[name].append(boot(words.image, name))
            except VshError as error:
                failures[name] += 1
                print(error.render(name), file=sys.stderr, flush=True)
    base = statistics.median(seconds[HOST])
    for name in names:
        taken = seconds[name] or [float("nan")]
        print(
            f"{name}: {len(seconds[name])} boots, {failures[name]} failures, median {statistics.median(taken):.2f} s, "
            f"max {max(taken):.2f} s, {statistics.median(taken) / base:.2f} of {HOST}'s",
            flush=True,
        )


if __name__ == "__main__":
    main()
