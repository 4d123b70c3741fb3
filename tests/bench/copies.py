"""Files in and out of a guest: `python -m tests.bench.copies [--rounds N] [--megabytes N] [--files N] [--unchanged N]`.

Starts a machine of the image bench, which has OpenSSH's server, and ends it. Prints medians; judges nothing. The sides
take turns, so that a busy moment hits all. OpenSSH goes over the same vsock, by vmkit's own proxy.

file in, file out   one file of random data: vmkit cp, vsh -- cat, scp, and sftp -D with vshd's own server
tree in, tree out   a directory of small files, 100 to a directory: vmkit cp, tar through vsh, scp -r
sync                a directory of files that are all the same on both sides already, in one directory
"""

import argparse
import contextlib
import itertools
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vmkit.bench.testbed import plan_vsh
from vmkit.machine.machine import Machine
from vmkit.ssh.access import prepare_access

IMAGE = "bench"
# A file of the default size, and as much again for the guest.
MEMORY = "2560M"
FILE_BYTES = 1000
FOLDER_FILES = 100
GUEST = "/tmp/copies"
MIB = 1 << 20

Side = Callable[[], float]


class Course:
    """The programs of each side, and the places of their files on both sides."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        access = prepare_access(machine.find_entry(), folder=folder / "ssh")
        self.host = access.machine
        self.config = ["-F", str(access.config)]
        self.vsh = [*plan_vsh(machine.name)]
        self.vmkit = [sys.executable, "-m", "vmkit"]
        self.out = folder / "out"
        self._numbers = itertools.count()
        launcher = folder / "vsh-sftp"
        launcher.write_text(f"#!/bin/sh\nexec {shlex.join(self.vsh)} --subsystem sftp\n")
        launcher.chmod(0o755)
        self.sftp_server = str(launcher)

    def clear(self) -> None:
        """Removes what a side has copied, outside of its time."""
        self.machine.run(["sh", "-c", f"rm -rf {GUEST} && mkdir {GUEST}"], check=True)
        self.clear_host()

    def clear_host(self) -> None:
        """Gives the next side an empty directory. A tree that came out before is kept until the end: ext4 gives no new
        file an inode that was freed in the last minute, and looks long for another.
        """
        with contextlib.suppress(FileNotFoundError):
            (self.out / "big").unlink()
        if self.out.exists():
            self.out.rename(self.folder / f"old-{next(self._numbers)}")
        self.out.mkdir()

    def run(self, *argv: str, stdin: Path | None = None, stdout: Path | None = None) -> float:
        """Runs a program of this host; the seconds that it took."""
        source = stdin or Path(os.devnull)
        with source.open("rb") as reader, (stdout or Path(os.devnull)).open("wb") as writer:
            started_s = time.perf_counter()
            subprocess.run(argv, stdin=reader, stdout=writer, check=True)
            return time.perf_counter() - started_s

    def run_sftp(self, line: str) -> float:
        """Runs one command of OpenSSH's sftp with vshd's server."""
        batch = self.folder / "batch"
        batch.write_text(line + "\n")
        return self.run("sftp", "-q", "-b", str(batch), "-D", self.sftp_server)


def race(title: str, sides: Mapping[str, Side], prepare: Callable[[], None], rounds: int, size_bytes: int = 0) -> None:
    """Runs the sides in turns, after a round that does not count. Prints the medians."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            prepare()
            seconds = side()
            if number:
                taken[name].append(seconds)
    print(f"\n{title}, medians of {rounds}")
    for name, values in taken.items():
        median = statistics.median(values)
        rate = f"{size_bytes / median / MIB:9.0f} MiB/s" if size_bytes else ""
        print(f"  {name:18} {median:8.2f} s{rate}    {min(values):.2f} to {max(values):.2f}", flush=True)


def race_file(course: Course, rounds: int, size_bytes: int) -> None:
    """One file, in and out."""
    source, target, there = course.folder / "big", course.out / "big", f"{GUEST}/big"
    block = os.urandom(MIB)
    with source.open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(block)
    name = course.machine.name
    sides: dict[str, Side] = {
        "vmkit cp": lambda: course.run(*course.vmkit, "cp", str(source), f"{name}:{there}"),
        "vsh -- cat": lambda: course.run(*course.vsh, "--", "sh", "-c", f"cat >{there}", stdin=source),
        "scp": lambda: course.run("scp", "-q", *course.config, str(source), f"{course.host}:{there}"),
        "sftp -D": lambda: course.run_sftp(f"put {source} {there}"),
    }
    race(f"file of {size_bytes // MIB} MiB in", sides, course.clear, rounds, size_bytes)
    course.clear()
    course.run(*course.vmkit, "cp", str(source), f"{name}:{there}")
    source.unlink()
    sides = {
        "vmkit cp": lambda: course.run(*course.vmkit, "cp", f"{name}:{there}", str(target)),
        "vsh -- cat": lambda: course.run(*course.vsh, "--", "cat", there, stdout=target),
        "scp": lambda: course.run("scp", "-q", *course.config, f"{course.host}:{there}", str(target)),
        "sftp -D": lambda: course.run_sftp(f"get {there} {target}"),
    }
    race(f"file of {size_bytes // MIB} MiB out", sides, course.clear_host, rounds, size_bytes)
    course.clear()


def make_tree(folder: Path, files: int, per_folder: int) -> None:
    """Makes small files, so many to a directory."""
    for number in range(files):
        path = folder / f"{number // per_folder}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(FILE_BYTES))


def race_tree(course: Course, rounds: int, files: int) -> None:
    """A tree of small files, in and out."""
    source, there = course.folder / "tree", f"{GUEST}/tree"
    make_tree(source, files, FOLDER_FILES)
    name, vsh, out = course.machine.name, shlex.join(course.vsh), shlex.join([str(course.out)])
    pack, unpack = f"tar -C {shlex.join([str(source)])} -cf - .", f"mkdir {there} && tar -C {there} -xf -"
    sides: dict[str, Side] = {
        "vmkit cp": lambda: course.run(*course.vmkit, "cp", str(source), f"{name}:{there}"),
        "tar through vsh": lambda: course.run("sh", "-c", f"{pack} | {vsh} -- sh -c '{unpack}'"),
        "scp -r": lambda: course.run("scp", "-q", "-r", *course.config, str(source), f"{course.host}:{there}"),
    }
    race(f"tree of {files} files in", sides, course.clear, rounds)
    course.clear()
    course.run(*course.vmkit, "cp", str(source), f"{name}:{there}")
    sides = {
        "vmkit cp": lambda: course.run(*course.vmkit, "cp", f"{name}:{there}", str(course.out)),
        "tar through vsh": lambda: course.run("sh", "-c", f"{vsh} -- tar -C {there} -cf - . | tar -C {out} -xf -"),
        "scp -r": lambda: course.run("scp", "-q", "-r", *course.config, f"{course.host}:{there}", str(course.out)),
    }
    race(f"tree of {files} files out", sides, course.clear_host, rounds)
    course.clear()


def race_sync(course: Course, rounds: int, files: int) -> None:
    """Files that are all the same on both sides."""
    source = course.folder / "same"
    make_tree(source, files, files)
    words = [*course.vmkit, "sync", str(source), f"{course.machine.name}:{GUEST}"]
    course.run(*words)
    sides: dict[str, Side] = {
        "vmkit sync": lambda: course.run(*words),
        "vmkit cp": lambda: course.run(*course.vmkit, "cp", f"{source}/.", f"{course.machine.name}:{GUEST}"),
    }
    race(f"sync of {files} unchanged files", sides, lambda: None, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--unchanged", type=int, default=10_000)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="vmkit-copies-") as folder,
        Machine(IMAGE, name=f"copies-{os.getpid()}", memory=MEMORY) as machine,
    ):
        # Its size is half of the memory, and of the number of files there is a limit, too.
        machine.run(["mount", "-o", "remount,size=80%,nr_inodes=1000000", "/tmp"], check=True)
        course = Course(machine, Path(folder))
        course.clear()
        race_tree(course, options.rounds, options.files)
        race_sync(course, options.rounds, options.unchanged)
        course.clear()
        if options.megabytes:
            race_file(course, options.rounds, options.megabytes * MIB)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
