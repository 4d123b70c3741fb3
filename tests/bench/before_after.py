"""This checkout beside another one, for changes that must cost nothing: `python -m tests.bench.before_after FOLDER`.

FOLDER is a checkout with an environment of its own (`make up` there). Both run the same programs, alternating; prints
medians and the ratio of this one to the other; judges nothing.

vshd      from fork to READY on a UNIX socket, as a guest starts it, and its resident memory then
vsh       `vsh -- true` as a whole process, against a vshd of the same checkout on this host
up        `vmkit up` of the cached image tiny, whole process, to READY
memory    resident memory of the monitor and of the device beside a machine that is up
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[2]
DEADLINE_S = 120.0
VSHD = "import sys; sys.path.insert(0, {!r}); from vshd.__main__ import main; sys.exit(main())"
START_COUNT, TRUE_COUNT, UP_COUNT = 101, 101, 11
KIB = 1024


class Checkout:
    """One of the two, with a folder for what it leaves."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        self.name = name
        self.root = root
        self.folder = folder / name
        self.env = {**os.environ, "VSH_AF_VSOCK": "deny", "PATH": f"{root / '.venv' / 'bin'}:{os.environ['PATH']}"}
        self.env["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
        for kind in ("runtime", "state"):
            (self.folder / kind).mkdir(mode=0o700, parents=True)
            self.env[f"VMKIT_{kind.upper()}_DIR"] = str(self.folder / kind)

    def run(self, *words: str) -> bytes:
        """The stdout of one of its programs. Raises CalledProcessError."""
        program = str(self.root / ".venv" / "bin" / words[0])
        done = subprocess.run(
            [program, *words[1:]],
            env=self.env,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE_S,
            check=True,
        )
        return done.stdout

    @contextlib.contextmanager
    def vshd(self) -> Iterator[tuple[Path, subprocess.Popen[bytes], float]]:
        """A vshd that is ready: its socket, its process, and the seconds from fork to READY."""
        path, ready = self.folder / "vshd.sock", self.folder / "ready.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(ready))
            notify.settimeout(DEADLINE_S)
            words = [sys.executable, "-I", "-S", "-c", VSHD.format(str(self.root)), f"--listen=unix:{path}"]
            started_s = time.monotonic()
            process = subprocess.Popen(
                words,
                env={**self.env, "NOTIFY_SOCKET": str(ready)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                notify.recv(100)
                yield path, process, time.monotonic() - started_s
            finally:
                process.terminate()
                process.wait(DEADLINE_S)
                ready.unlink()


def take_turns(checkouts: list[Checkout], number: int) -> list[Checkout]:
    """Which of them goes first in round `number`: each time the other one."""
    return checkouts[:: 1 if number % 2 else -1]


def read_rss(pid: int) -> float:
    """Resident memory in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / KIB


def print_pair(what: str, unit: str, values: dict[str, list[float]]) -> None:
    """The medians of this checkout and of the other, and their ratio."""
    now, before = (statistics.median(values[name]) for name in ("now", "before"))
    ratio = statistics.median(a / b for a, b in zip(values["now"], values["before"], strict=True))
    count = len(values["now"])
    print(f"{what:<38} {now:9.2f} {unit:<4} before {before:9.2f} {unit:<4} ratio {ratio:5.2f}  n {count}", flush=True)


def bench_vshd(checkouts: list[Checkout]) -> None:
    """Starts, and memory at READY."""
    times: dict[str, list[float]] = {"now": [], "before": []}
    sizes: dict[str, list[float]] = {"now": [], "before": []}
    for number in range(START_COUNT + 1):
        for checkout in take_turns(checkouts, number):
            with checkout.vshd() as (_, process, seconds):
                # The first of each fills the page cache and writes what Python compiles.
                if number:
                    times[checkout.name].append(seconds * 1000)
                    sizes[checkout.name].append(read_rss(process.pid))
    print_pair("vshd, fork to READY", "ms", times)
    print_pair("vshd, memory at READY", "MiB", sizes)


def bench_vsh(checkouts: list[Checkout]) -> None:
    """`vsh -- true` as users start it."""
    times: dict[str, list[float]] = {"now": [], "before": []}
    with contextlib.ExitStack() as stack:
        paths = {checkout.name: stack.enter_context(checkout.vshd())[0] for checkout in checkouts}
        for number in range(TRUE_COUNT + 2):
            for checkout in take_turns(checkouts, number):
                started_s = time.monotonic()
                checkout.run("vsh", f"--unix={paths[checkout.name]}", "--", "true")
                if number > 1:
                    times[checkout.name].append((time.monotonic() - started_s) * 1000)
    print_pair("vsh -- true, whole process", "ms", times)


def bench_up(checkouts: list[Checkout]) -> None:
    """`vmkit up`, and the memory of the machine's processes on the host."""
    times: dict[str, list[float]] = {"now": [], "before": []}
    sizes: dict[str, dict[str, list[float]]] = {kind: {"now": [], "before": []} for kind in ("monitor", "device")}
    for number in range(UP_COUNT + 1):
        for checkout in take_turns(checkouts, number):
            started_s = time.monotonic()
            checkout.run("vmkit", "up", "--accel", "tcg", "--backend", "user", "--name", "bench", "--quiet")
            seconds = time.monotonic() - started_s
            monitor = int(json.loads(checkout.run("vmkit", "list", "--json"))[0]["pid"])
            if number:
                times[checkout.name].append(seconds)
                for kind, pid in (("monitor", monitor), ("device", find_device(monitor))):
                    sizes[kind][checkout.name].append(read_rss(pid))
            checkout.run("vmkit", "kill", "bench")
    print_pair("vmkit up, cached image, to READY", "s", times)
    for kind, values in sizes.items():
        print_pair(f"{kind}, memory beside a machine", "MiB", values)


def find_device(monitor: int) -> int:
    """The monitor's child that is our vsock device."""
    for pid in Path(f"/proc/{monitor}/task/{monitor}/children").read_text().split():
        program = Path(f"/proc/{pid}/exe").readlink().name
        if program.startswith("python") and b"vsock" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return int(pid)
    raise SystemExit("the monitor has no device process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the other checkout")
    parser.add_argument("--part", choices=["vshd", "vsh", "up", "all"], default="all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
        checkouts = [
            Checkout("now", HERE, Path(folder)),
            Checkout("before", options.folder.resolve(), Path(folder)),
        ]
        for name, work in (("vshd", bench_vshd), ("vsh", bench_vsh), ("up", bench_up)):
            if options.part in (name, "all"):
                work(checkouts)


if __name__ == "__main__":
    main()
