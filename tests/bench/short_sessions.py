"""Where a short session's time goes: `python -m tests.bench.short_sessions [--rounds N] [--before FOLDER]`.

Times `true` through a vshd on this host and in a guest (tiny), as a whole process and from a program that runs
already. Then it boots a guest whose clock counts instructions (QEMU's -icount), and prints what each process of the
guest executes for one `true`: a figure that a busy host does not change. FOLDER is another checkout, which takes turns.
Sides alternate, and all figures are medians. Judges nothing.
"""

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[2]
DEADLINE_S = 300.0
NAME = "short"
PAUSE_S = 0.15
# What is less than a hundredth of a million is not shown.
LEAST = 0.01
START = "import sys; sys.path.insert(0, {!r}); from {}.__main__ import main; sys.exit(main())"
LOAD = "import gc; gc.disable(); import sys; sys.path.insert(0, {!r}); import vsh.__main__, vsh.cli; gc.freeze()"
# A program that runs commands: a count in, milliseconds for each command out.
CLIENT = """
import sys, time
from vsh.address import Address, find_by_name
from vsh.client import Client
client = Client(Address.unix(sys.argv[1]) if "/" in sys.argv[1] else find_by_name(sys.argv[1]))
for line in sys.stdin:
    started = time.perf_counter()
    for _ in range(int(line)):
        client.run(["true"])
    print((time.perf_counter() - started) * 1e3 / int(line), flush=True)
"""
TRACE = "/sys/kernel/tracing"
BEGIN = f"""mkdir -p {TRACE}; mount -t tracefs t {TRACE}; cd {TRACE}; echo 0 >tracing_on; echo 4096 >buffer_size_kb
for event in sched/sched_switch vsock exceptions/page_fault_user; do echo 1 >events/$event/enable; done
echo 1 >tracing_on
"""
EVENT = re.compile(r"\s*.+-\d+\s+\[000\] \S+\s+([\d.]+): (\w+): ?(.*)")
SWITCH = re.compile(r"prev_comm=(\S+) prev_pid=(\d+) .*==> next_comm=(\S+)")
# On PATH before the real one. With shift=0 an instruction takes a nanosecond of the guest's clock.
COUNTING_QEMU = """#!/bin/sh
case "$*" in *-kernel*) exec {0} "$@" -icount shift=0 ;; esac
exec {0} "$@"
"""


class Side:
    """One checkout. Both run with this interpreter."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        self.name = name
        self.root = root
        self.folder = folder / name
        self.env = {**os.environ, "PYTHONPATH": str(root), "VSH_AF_VSOCK": "deny", "VSH_CONFIG": "/nonexistent"}
        self.env["VMKIT_BACKGROUND_SNAPSHOTS"] = "off"
        for kind in ("runtime", "state"):
            (self.folder / kind).mkdir(mode=0o700, parents=True)
            self.env[f"VMKIT_{kind.upper()}_DIR"] = str(self.folder / kind)
        self.socket = self.folder / "vshd.sock"

    def run(self, *argv: str, path: str = "") -> str:
        """Runs a program of this checkout. Raises CalledProcessError."""
        env = {**self.env, "PATH": f"{path}:{self.env['PATH']}"} if path else self.env
        argv = (sys.executable, *argv)
        # vsh reads a stdin that it gets.
        return subprocess.run(
            argv,
            env=env,
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=DEADLINE_S,
        ).stdout

    def plan_vsh(self, *where: str) -> list[str]:
        return ["-I", "-S", "-c", START.format(str(self.root), "vsh"), *where, "--", "true"]

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """A vshd of this checkout, and a machine of its own."""
        vshd = ["-I", "-S", "-c", START.format(str(self.root), "vshd"), f"--listen=unix:{self.socket}", "--log_stderr"]
        with subprocess.Popen([sys.executable, *vshd], env=self.env, stderr=subprocess.DEVNULL) as daemon:
            try:
                with self.machine():
                    yield
            finally:
                daemon.terminate()

    @contextlib.contextmanager
    def machine(self, path: str = "") -> Iterator[None]:
        self.run("-m", "vmkit", "up", "tiny", "--name", NAME, "--boot", "--timeout", "200", path=path)
        try:
            yield
        finally:
            self.run("-m", "vmkit", "down", NAME)

    @contextlib.contextmanager
    def client(self, where: str) -> Iterator["subprocess.Popen[str]"]:
        argv = [sys.executable, "-c", CLIENT, where]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, env=self.env, cwd=self.root, stdin=pipe, stdout=pipe, text=True) as client:
            ask(client, 10)
            yield client


def ask(client: "subprocess.Popen[str]", count: int) -> float:
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write(f"{count}\n")
    client.stdin.flush()
    return float(client.stdout.readline())


def time_process(side: Side, argv: list[str]) -> float:
    started_s = time.perf_counter()
    side.run(*argv)
    return (time.perf_counter() - started_s) * 1e3


def measure_times(sides: list[Side], rounds: int) -> None:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with contextlib.ExitStack() as stack:
        clients = {}
        for side in sides:
            stack.enter_context(side.serve())
            clients[side.name] = [stack.enter_context(side.client(where)) for where in (str(side.socket), NAME)]
        for number in range(rounds):
            for side in sides if number % 2 else sides[::-1]:
                here, guest = clients[side.name]
                times = {
                    "python3 -I -S -c pass": time_process(side, ["-I", "-S", "-c", "pass"]),
                    "the same, which loads vsh": time_process(side, ["-I", "-S", "-c", LOAD.format(str(side.root))]),
                    "vsh -- true, over AF_UNIX": time_process(side, side.plan_vsh(f"--unix={side.socket}")),
                    "vsh -- true, in a guest": time_process(side, side.plan_vsh(f"--vm_name={NAME}")),
                    "Client.run, over AF_UNIX": ask(here, 1),
                    "Client.run, in a guest": ask(guest, 1),
                }
                time.sleep(PAUSE_S)
                times["Client.run, in a guest, 10 in a row"] = ask(guest, 10)
                time.sleep(PAUSE_S)
                for what, value in times.items():
                    found[what][side.name].append(value)
    for what, values in found.items():
        print(f"{what:<40}" + "".join(f"{name:>8} {statistics.median(each):8.2f} ms" for name, each in values.items()))


def measure_instructions(side: Side, rounds: int) -> None:
    """One side's guest by itself: while it runs, its clock is the count of its instructions."""
    qemu = shutil.which("qemu-system-x86_64")
    folder = side.folder / "bin"
    folder.mkdir()
    wrapper = folder / "qemu-system-x86_64"
    wrapper.write_text(COUNTING_QEMU.format(qemu))
    wrapper.chmod(0o755)
    with side.machine(str(folder)), side.client(NAME) as client:
        vsh = ["-m", "vsh", f"--vm_name={NAME}", "--", "sh", "-c"]
        side.run(*vsh, BEGIN)
        for _ in range(rounds + 1):
            # So that the guest is at rest before and after.
            time.sleep(2 * PAUSE_S)
            ask(client, 1)
        time.sleep(2 * PAUSE_S)
        trace = side.run(*vsh, f"echo 0 >{TRACE}/tracing_on; cat {TRACE}/trace")
    sessions = split_sessions(trace)[1:-1]
    print(f"{side.name}: one true in a guest, median of {len(sessions)}")
    for what in sorted({what for session in sessions for what in session}):
        count = statistics.median(session.get(what, 0.0) for session in sessions)
        if count >= LEAST:
            print(f"  {what:<44}{count:10.2f}")


def split_sessions(trace: str) -> list[dict[str, float]]:
    """For each session: million instructions of each program of the guest, packets, page faults."""
    sessions: list[dict[str, float]] = []
    since_ms = 0.0
    for match in filter(None, map(EVENT.match, trace.splitlines())):
        at_ms, event, words = float(match[1]) * 1e3, match[2], match[3]
        if event == "virtio_transport_recv_pkt" and "op=REQUEST" in words:
            sessions.append(defaultdict(float))
        if sessions and event.startswith("virtio_transport"):
            sessions[-1]["packets"] += 1
        elif sessions and event == "page_fault_user":
            sessions[-1]["page faults"] += 1
        elif event == "sched_switch" and (switch := SWITCH.match(words)):
            if sessions and not switch[1].startswith("swapper"):
                program = switch[1].partition("/")[0]
                sessions[-1]["Minsn, all"] += at_ms - since_ms
                sessions[-1][f"Minsn, {program}"] += at_ms - since_ms
            since_ms = at_ms
    return sessions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--before", type=Path, help="another checkout")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side("now", HERE, Path(folder))]
        if given.before is not None:
            sides.insert(0, Side("before", given.before.resolve(), Path(folder)))
        measure_times(sides, given.rounds)
        for side in sides:
            measure_instructions(side, min(given.rounds, 12))


if __name__ == "__main__":
    main()
