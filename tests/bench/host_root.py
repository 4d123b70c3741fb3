"""This host's own files as the root of a guest: `python -m tests.bench.host_root [--rounds N]`.

First READY of a kernel in its build tree with the host's root, and of tiny. Then one command there, and by virtme-ng
with the same kernel and the same files. All take turns, on TCG, without snapshots. Prints medians and the smallest, and
judges nothing. virtme-ng and Debian's kernel are in the folder of tests.bench.rivals, which installs them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import vmkit
from tests.bench.rivals import DEADLINE_S, FOLDER, Rivals
from tests.guest.kernel_tree import lay_out

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"
SCRIPT = """
import sys, vmkit
with vmkit.Machine(tree=sys.argv[1], root_from="/", accelerator="tcg", memory="1G") as machine:
    machine.run(["uname", "-r"], check=True)
"""


def boot(image: str, tree: Path | None = None, root_from: str | None = None) -> float:
    """Seconds until READY."""
    with vmkit.Machine(
        image, accelerator="tcg", backend="user", boot=True, tree=tree, root_from=root_from, memory="1G"
    ) as machine:
        return machine.started.seconds


def run_vmkit(tree: Path) -> float:
    """Seconds from the first process to the end of one command on the host's files, machine included."""
    started_s = time.monotonic()
    words = [sys.executable, "-c", SCRIPT, str(tree)]
    subprocess.run(words, check=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL)
    return time.monotonic() - started_s


def run_vng(rivals: Rivals) -> float:
    """The same by virtme-ng."""
    started_s = time.monotonic()
    words = rivals.vng("--user", "root", "--memory", "1G", "--exec", "uname -r")
    subprocess.run(
        words, check=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL, capture_output=True, env=rivals.environment()
    )
    return time.monotonic() - started_s


def measure(sides: Mapping[str, Callable[[], float]], rounds: int) -> None:
    """Runs the sides in turn, and prints a line for each. The first is what the others are compared with."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    base = statistics.median(next(iter(figures.values())))
    for name, seconds in figures.items():
        median = statistics.median(seconds)
        print(f"{name}: median {median:.2f} s, min {min(seconds):.2f} s, {median / base:.2f} of the first", flush=True)


def measure_host_root(rounds: int) -> None:
    """The two tables of the host's root."""
    rivals = Rivals(FOLDER)
    rivals.install()
    package = next(rivals.folder.glob("linux-image-*.deb"))
    with tempfile.TemporaryDirectory() as folder:
        tree = lay_out(package, Path(folder))
        print("until READY")
        measure({"tiny": lambda: boot("tiny"), "--tree --root-from /": lambda: boot("any", tree, "/")}, rounds)
        print("one command, from the first process to the last")
        measure({"vmkit": lambda: run_vmkit(tree), "virtme-ng": lambda: run_vng(rivals)}, rounds)


def main() -> None:
    """Runs the rounds, and prints a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    words = parser.parse_args()
    os.environ[VARIABLE] = "off"
    measure_host_root(words.rounds)


if __name__ == "__main__":
    main()
