"""This host's own files as the root of a guest: `python -m tests.bench.host_root [--reads] [--rounds N]`.

With --reads, one large file is read by virtiofs, by 9p and from a disk with the same files, in machines of one kernel
that take turns: at first, and once more from the guest's memory. It needs to make namespaces.

Otherwise, first READY of a kernel in its build tree with the host's root, and of tiny. Then one command there, and by
virtme-ng with the same kernel and the same files. All take turns, on TCG, without snapshots. Prints medians and the
smallest, and judges nothing. virtme-ng and Debian's kernel are in the folder of tests.bench.rivals, which gets
them.
"""

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import vmkit
from tests.bench.rivals import DEADLINE_S, FOLDER, Rivals
from tests.guest.debian_virtiofsd import lay_out_virtiofsd
from tests.guest.kernel_tree import find_package, lay_out
from vmkit.image.build import build_image
from vmkit.image.formats.cpio import read_cpio
from vmkit.image.recipe.config import load_image
from vmkit.machine import virtiofsd

VARIABLE = "VMKIT_BACKGROUND_SNAPSHOTS"
SCRIPT = """
import sys, vmkit
with vmkit.Machine(tree=sys.argv[1], root_from="/", accelerator="tcg", memory="1G") as machine:
    machine.run(["uname", "-r"], check=True)
"""

# A kernel that has all three.
KERNEL = """
extends = "tiny"
kernel = "linux-image-amd64"
kernel_suite = "bookworm"
"""
LARGE_MIB = 128
READ = ("/bin/busybox", "dd", "if=/large", "of=/dev/null", "bs=1M")


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


def read_twice(way: str, tree: Path, folder: Path, programs: Path) -> list[float]:
    """MB/s of the first and of the second reading of the large file."""
    is_disk = way == "virtio-blk"
    path = os.environ["PATH"]
    # Without the program, vmkit takes 9p.
    virtiofsd.PLACES = ()
    os.environ["PATH"] = f"{programs}:{path}" if way == "virtiofs" else path
    try:
        with vmkit.Machine(
            str(folder) if is_disk else "any",
            root_from=None if is_disk else folder,
            tree=tree,
            accelerator="tcg",
            backend="user",
            boot=True,
            memory="512M",
            timeout_s=DEADLINE_S,
        ) as machine:
            choices = machine.started.choices
            assert choices.root_type == ("ext4" if is_disk else way), choices.live
            told = [machine.run(READ, text=True, check=True).stderr for _ in range(2)]
    finally:
        os.environ["PATH"] = path
    found = [re.search(r"copied, ([0-9.]+) seconds", text) for text in told]
    return [LARGE_MIB * 1.048576 / float(match[1]) for match in found if match]


def measure_reads(rounds: int) -> None:
    """Prints a line for each way and reading. The first is what the others are compared with."""
    figures: dict[str, list[list[float]]] = {"virtio-blk": [], "virtiofs": [], "9p": []}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        recipe = base / "kernel.toml"
        recipe.write_text(KERNEL)
        tree = lay_out(find_package(str(recipe)), base / "tree")
        (base / "tools").mkdir()
        programs = lay_out_virtiofsd(base / "tools")
        root = base / "root"
        (root / "bin").mkdir(parents=True)
        entries = read_cpio(build_image(load_image("tiny")).initrd.read_bytes())
        busybox = next(entry.node.data for entry in entries if entry.path == "usr/bin/busybox")
        (root / "bin/busybox").write_bytes(busybox)
        (root / "bin/busybox").chmod(0o755)
        (root / "bin/sh").symlink_to("busybox")
        # The same in each run: the disk is packed once.
        (root / "large").write_bytes(random.Random(1).randbytes(LARGE_MIB << 20))
        for _ in range(rounds):
            for way, seen in figures.items():
                seen.append(read_twice(way, tree, root, programs))
    for turn, title in enumerate(("first", "again")):
        base_mbs = statistics.median(pair[turn] for pair in figures["virtio-blk"])
        for way, seen in figures.items():
            median = statistics.median(pair[turn] for pair in seen)
            print(f"{way}, {title}: median {median:.0f} MB/s, {median / base_mbs:.2f} of virtio-blk", flush=True)


def main() -> None:
    """Runs the rounds, and prints a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reads", action="store_true")
    words = parser.parse_args()
    os.environ[VARIABLE] = "off"
    (measure_reads if words.reads else measure_host_root)(words.rounds)


if __name__ == "__main__":
    main()
