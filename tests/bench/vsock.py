"""The vsock device with a real guest: `python -m tests.bench.vsock [--turns N] [--against CHECKOUT]`.

Each turn boots a machine of the image tiny and measures round trips, both directions and connecting. With --against the
turns alternate with those of another checkout of this project, and the medians stand side by side.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from vmkit import Machine
from vmkit.machine.spec import Backend

PORT = 9100
ROUND_TRIPS = 2000
CONNECTS = 300
BULK_BYTES = 200 << 20
PIECE = bytes(1 << 18)
UNITS = {"echo": "us", "connect": "us", "to guest": "MB/s", "to host": "MB/s", "cpu": "ms", "memory": "MiB"}

# Runs in the guest: one byte says what a connection is for.
GUEST = f"""
import _socket, os
listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
listener.bind((0xFFFFFFFF, {PORT}))
listener.listen(8)
os.write(1, b"up")
buffer = memoryview(bytearray(1 << 18))
while True:
    fd, _ = listener._accept()
    mode = os.read(fd, 1)
    if mode == b"e":
        while count := os.readv(fd, [buffer]):
            os.write(fd, buffer[:count])
    elif mode == b"i":
        left = {BULK_BYTES}
        while left:
            left -= os.readv(fd, [buffer])
        os.write(fd, b"x")
    elif mode == b"o":
        left = {BULK_BYTES}
        while left:
            left -= os.write(fd, buffer[:left])
    os.close(fd)
"""


def open_connection(path: str, mode: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(b"CONNECT %d\n" % PORT)
    assert connection.recv(100).startswith(b"OK ")
    connection.sendall(mode)
    return connection


def measure_echo(path: str) -> float:
    """Microseconds of a round trip of 16 bytes, the median."""
    times = []
    with open_connection(path, b"e") as connection:
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            connection.sendall(bytes(16))
            connection.recv(16)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def measure_connect(path: str) -> float:
    """Microseconds from connect() to OK, the median."""
    times = []
    for _ in range(CONNECTS):
        started = time.perf_counter()
        connection = open_connection(path, b"-")
        times.append(time.perf_counter() - started)
        connection.recv(1)
        connection.close()
    return statistics.median(times) * 1e6


def measure_to_guest(path: str) -> float:
    started = time.perf_counter()
    with open_connection(path, b"i") as connection:
        left = BULK_BYTES
        while left:
            left -= connection.send(PIECE[:left])
        assert connection.recv(1) == b"x"
    return BULK_BYTES / (time.perf_counter() - started) / 1e6


def measure_to_host(path: str) -> float:
    started = time.perf_counter()
    buffer = bytearray(1 << 18)
    with open_connection(path, b"o") as connection:
        left = BULK_BYTES
        while left:
            left -= connection.recv_into(buffer)
    return BULK_BYTES / (time.perf_counter() - started) / 1e6


def find_device(directory: Path) -> int:
    """The process id of the newest device of a machine, from its event log."""
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [int(event["pid"]) for event in events if event["event"] == "device-started"][-1]


def measure_turn() -> dict[str, float]:
    """One machine's figures."""
    with Machine("tiny", memory=256, backend=Backend.USER) as machine:
        session = machine.connect().open_session(["python3", "-I", "-S", "-c", GUEST])
        while not session.receive():
            time.sleep(0.01)
        path = str(machine.directory / "vsock.sock")
        figures = {
            "echo": measure_echo(path),
            "connect": measure_connect(path),
            "to guest": measure_to_guest(path),
            "to host": measure_to_host(path),
        }
        proc = Path(f"/proc/{find_device(machine.directory)}")
        ticks = sum(map(int, (proc / "stat").read_text().rpartition(") ")[2].split()[11:13]))
        figures["cpu"] = ticks * 1e3 / os.sysconf("SC_CLK_TCK")
        figures["memory"] = int((proc / "status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        session.close()
    return figures


def run_turn(checkout: Path) -> dict[str, float]:
    """A turn in a process of its own, with the vmkit of a checkout."""
    environ = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-P", __file__, "--one"]
    output = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True).stdout
    return dict(json.loads(output))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_turn()))
        return 0
    sides = {"here": Path(__file__).parents[2]}
    if options.against:
        sides["there"] = options.against.absolute()
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.turns):
        # Who comes first alternates, too.
        for side in sorted(sides, reverse=bool(number % 2)):
            turns[side].append(run_turn(sides[side]))
    for what, unit in UNITS.items():
        medians = [statistics.median(turn[what] for turn in turns[side]) for side in sides]
        ratio = f"  {medians[0] / medians[-1]:.3f}" if len(medians) > 1 else ""
        print(f"{what:<10}" + "".join(f"{median:>10.1f}" for median in medians) + f"  {unit}{ratio}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
