"""Our vsock device against vhost-device-vsock: `python -m tests.bench.vsock_rival [--turns N] [--program FILE]`.

Each turn starts one QEMU by hand for each device, with the same command, and measures round trips, connecting and both
directions with the same server in the guest. Prints medians side by side. A direction that stands still for STALL_S is
printed as stalled. Without --program it fetches Debian's package. Judges nothing.
"""

import argparse
import contextlib
import math
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.rivals import FOLDER
from tests.bench.vsock import GUEST, UNITS, measure_connect, measure_echo, measure_to_guest, measure_to_host
from tests.guest.rival_device import fetch_program
from tests.vsh.live import is_listening

READY_PORT = 7777
CID = 77
START_DEADLINE_S = 120
STALL_S = 5.0
MEASURES: dict[str, Callable[[str], float]] = {
    "echo": measure_echo,
    "connect": measure_connect,
    "to guest": measure_to_guest,
    "to host": measure_to_host,
}


@contextlib.contextmanager
def running(*argv: str, stdout: int = subprocess.DEVNULL) -> "Iterator[subprocess.Popen[bytes]]":
    """A process that is gone afterwards."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def render_qemu(folder: Path, front: Path) -> list[str]:
    """QEMU's command for tiny as vmkit makes it, with the device of `front`."""
    argv = [sys.executable, "-m", "vmkit", "up", "tiny", "--accel", "tcg", "--dry-run"]
    text = subprocess.run(argv, stdout=subprocess.PIPE, check=True, text=True).stdout
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(("qemu-system", "/usr/bin/qemu-system"))]
    words = shlex.split(line)
    words[words.index("stdio,id=console,mux=on,signal=off")] = f"file,id=console,path={folder / 'console'}"
    words += ["-chardev", f"socket,id=vsock,path={front}"]
    return [*words, "-device", "vhost-user-vsock-pci,chardev=vsock,bus=vsock-port"]


def wait_for(is_done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while not is_done():
        if time.monotonic() > deadline_s:
            raise SystemExit("the device did not start")
        time.sleep(0.02)


def measure_turn(render_device: Callable[[Path, Path], list[str]]) -> dict[str, float]:
    """One guest's figures. A stalled direction is infinite, and the processor time is the device's."""
    with tempfile.TemporaryDirectory(prefix="vsock-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        front, uds = folder / "front", folder / "v"
        ready = stack.enter_context(socket.socket(socket.AF_UNIX))
        ready.bind(f"{uds}_{READY_PORT}")
        ready.listen()
        ready.settimeout(START_DEADLINE_S)
        device = stack.enter_context(running(*render_device(front, uds)))
        wait_for(lambda: is_listening(front))
        stack.enter_context(running(*render_qemu(folder, front)))
        connection, _ = ready.accept()
        with connection, connection.makefile("rb") as report:
            assert b"READY=1" in report.read()
        argv = [sys.executable, "-m", "vsh", f"--uds={uds}", "--", "python3", "-I", "-S", "-c", GUEST]
        server = stack.enter_context(running(*argv, stdout=subprocess.PIPE))
        assert server.stdout is not None
        server.stdout.read(2)
        figures = {}
        for what, measure in MEASURES.items():
            try:
                figures[what] = measure(str(uds))
            except TimeoutError:
                figures[what] = math.inf
        proc = Path(f"/proc/{device.pid}")
        ticks = sum(map(int, (proc / "stat").read_text().rpartition(") ")[2].split()[11:13]))
        figures["cpu"] = ticks * 1e3 / os.sysconf("SC_CLK_TCK")
        figures["memory"] = int((proc / "status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        return figures


def main() -> None:
    """Runs the turns, and prints a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    program = options.program or fetch_program(FOLDER)
    # Of the sockets that the measures make.
    socket.setdefaulttimeout(STALL_S)
    ours = [sys.executable, "-m", "vmkit", "device", "vsock"]
    subprocess.run([sys.executable, "-m", "vmkit", "build", "--quiet", "tiny"], stdout=subprocess.DEVNULL, check=True)
    sides = {
        "vmkit": lambda front, uds: [*ours, "--socket", str(front), "--cid", str(CID), "--uds-path", str(uds)],
        "vhost-device-vsock": lambda front, uds: [
            str(program),
            *("--socket", str(front), "--guest-cid", str(CID), "--uds-path", str(uds)),
        ],
    }
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.turns):
        # Who comes first alternates, too.
        for side in sorted(sides, reverse=bool(number % 2)):
            turns[side].append(measure_turn(sides[side]))
    print(f"{'':<10}" + "".join(f"{side:>20}" for side in sides))
    for what, unit in UNITS.items():
        medians = [statistics.median(turn[what] for turn in turns[side]) for side in sides]
        shown = "".join(f"{'stalled' if math.isinf(median) else f'{median:.1f}':>20}" for median in medians)
        print(f"{what:<10}{shown}  {unit}  {medians[0] / medians[1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
