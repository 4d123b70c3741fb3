"""Many connections of the vsock device with a real guest: `python -m tests.bench.vsock_many [--open N] [--in-turn N]`.

Boots a machine of the image tiny, with one server in the guest that serves all connections. Prints the device's own
memory while many connections are open, and before and after many that came one after another; and round trips beside a
connection whose guest program reads nothing. Judges nothing.
"""

import argparse
import contextlib
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.vsock import find_device
from vmkit import Machine
from vmkit.machine.spec import Backend

PORT = 9100
ROUND_TRIPS = 1000
ROUNDS = 5
STALLED_BYTES = 1 << 20

# Runs in the guest: `e` wants its bytes back, `s` is never read again.
GUEST = f"""
import _socket, os, resource, select
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
listener.bind((0xFFFFFFFF, {PORT}))
listener.listen(1024)
os.write(1, b"up")
poll = select.epoll()
poll.register(listener.fileno(), select.EPOLLIN)
modes = {{}}
while True:
    for fd, _ in poll.poll():
        if fd == listener.fileno():
            client, _ = listener._accept()
            modes[client] = b""
            poll.register(client, select.EPOLLIN)
            continue
        data = os.read(fd, 4096)
        if not data:
            del modes[fd]
            os.close(fd)
        elif modes[fd]:
            os.write(fd, data)
        else:
            modes[fd] = data[:1]
            if data[:1] == b"s":
                poll.unregister(fd)
            os.write(fd, b"k")
"""


def open_connection(path: str, mode: bytes) -> socket.socket:
    """A connection that the guest's server has taken."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(path)
    connection.sendall(b"CONNECT %d\n" % PORT)
    assert connection.recv(100).startswith(b"OK ")
    connection.sendall(mode)
    assert connection.recv(1) == b"k"
    return connection


def measure_rss(pid: int) -> float:
    """MiB of the device without the guest's memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure_echo(connection: socket.socket) -> float:
    """Microseconds of a round trip of 16 bytes, the median."""
    times = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        connection.sendall(bytes(16))
        connection.recv(16)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


@contextlib.contextmanager
def stalled(path: str) -> Iterator[None]:
    """A connection with as much on its way as guest and device take."""
    with open_connection(path, b"s") as connection:
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            for _ in range(64):
                connection.sendall(bytes(STALLED_BYTES))
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Many connections of the vsock device.")
    parser.add_argument("--open", type=int, default=2000, dest="open_count")
    parser.add_argument("--in-turn", type=int, default=100_000, dest="turn_count")
    options = parser.parse_args()
    with Machine("tiny", memory=512, backend=Backend.USER) as machine:
        # One that lasts: a session whose client is busy for minutes would end.
        server = machine.connect().start(["python3", "-I", "-S", "-c", GUEST])
        while not server.read().stdout:
            time.sleep(0.05)
        path, pid = str(machine.directory / "vsock.sock"), find_device(machine.directory)
        with open_connection(path, b"e") as connection:
            measure_echo(connection)
            alone, beside = [], []
            for _ in range(ROUNDS):
                alone.append(measure_echo(connection))
                with stalled(path):
                    beside.append(measure_echo(connection))
            one, other = statistics.median(alone), statistics.median(beside)
            print(f"a round trip: {one:.0f} us alone, {other:.0f} us beside a stalled connection: {other / one:.2f}")
        before = measure_rss(pid)
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            crowd = [stack.enter_context(open_connection(path, b"e")) for _ in range(options.open_count)]
            seconds = time.perf_counter() - started
            for connection in crowd:
                connection.sendall(b"x")
            assert all(connection.recv(1) == b"x" for connection in crowd)
            print(f"{len(crowd)} open at once, in {seconds:.1f} s: {before:.1f} MiB, then {measure_rss(pid):.1f} MiB")
        for _ in range(1000):
            open_connection(path, b"e").close()
        before, started = measure_rss(pid), time.perf_counter()
        for _ in range(options.turn_count):
            open_connection(path, b"e").close()
        seconds = time.perf_counter() - started
        rate = options.turn_count / seconds
        print(
            f"{options.turn_count} one after another, {rate:.0f} a second: {before:.1f} MiB, then "
            f"{measure_rss(pid):.1f} MiB"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
