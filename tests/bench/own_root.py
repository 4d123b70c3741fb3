"""A root of a user's own against tiny's.

    python -m tests.bench.own_root SOURCE [--rounds N] [--run] [--snapshots] [--memory SIZE]

Both start in turn, on TCG, by a boot. Prints medians and the smallest of READY. With --run it is the time of
`vmkit run SOURCE true` from its start to its end. The first one is printed alone: it packs SOURCE. With --snapshots
both start from theirs, which are made before. Judges nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import vmkit
from vmkit.image.cache import find_cache_dir

# What the first run must not find.
PACKED = ("roots", "sources", "tmp")
HARDWARE = ("--accel", "tcg", "--backend", "user")


def boot(source: str, memory: str, *, is_boot: bool = True) -> float:
    """Seconds until READY."""
    with vmkit.Machine(source, memory=memory, accelerator="tcg", backend="user", boot=is_boot) as machine:
        return machine.started.seconds


def run(source: str, memory: str, cache: Path | None = None, *, is_boot: bool = True) -> float:
    """Seconds of the whole program, which runs `true`."""
    options = ["--memory", memory, *(("--boot",) if is_boot else ())]
    argv = [sys.executable, "-m", "vmkit", "run", "-q", *HARDWARE, *options, source, "true"]
    environ = os.environ if cache is None else {**os.environ, "VMKIT_CACHE_DIR": str(cache)}
    began_s = time.perf_counter()
    subprocess.run(argv, check=True, env=environ, stdin=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def run_first(source: str, memory: str) -> float:
    """As run(), with a cache that has all but roots."""
    cache = find_cache_dir()
    with tempfile.TemporaryDirectory(prefix="own-root-", dir=cache) as folder:
        for path in cache.iterdir():
            if path.name not in PACKED and path != Path(folder):
                (Path(folder) / path.name).symlink_to(path)
        return run(source, memory, Path(folder))


def save(source: str, memory: str) -> None:
    """Makes the snapshot, unless it is there."""
    argv = [sys.executable, "-m", "vmkit", "snapshot", "make", "-q", *HARDWARE, "--memory", memory, source]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def main() -> None:
    """Runs the rounds, and prints a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--snapshots", action="store_true")
    parser.add_argument("--memory", default="256M", help="of both sides")
    words = parser.parse_args()
    os.environ["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
    measure: Callable[..., float] = run if words.run else boot
    if words.run:
        print(f"{words.source}: the first vmkit run {run_first(words.source, words.memory):.2f} s", flush=True)
    sides: dict[str, list[float]] = {"tiny": [], words.source: []}
    if words.snapshots:
        for source in sides:
            save(source, words.memory)
    for _ in range(words.rounds):
        for source, seconds in sides.items():
            seconds.append(measure(source, words.memory, is_boot=not words.snapshots))
    base = statistics.median(sides["tiny"])
    for source, seconds in sides.items():
        median = statistics.median(seconds)
        print(f"{source}: median {median:.2f} s, min {min(seconds):.2f} s, {median / base:.2f} of tiny's")


if __name__ == "__main__":
    main()
