"""vsh's bulk in a guest beside an unframed relay by the same Python: `python -m tests.bench.vsh_guest MACHINE`.

The relay is what a session does without framing, users, credit and signals: 256 KiB reads between the target's pipe and
the vsock connection. Both sides start their target in the guest, in turns; MACHINE must run.
"""

import socket
import statistics
import sys
import time

from vmkit.bench.sinks import plan_source
from vsh.address import Address, find_by_name
from vsh.client import Client
from vsh.memory import BytesSource
from vsh.pump import Pump, Sink
from vshd.wire import messages

PORT = 9100
TURNS = 5
# Enough that starting a session, 0.1 s under emulation, does not count.
SIZE = {"out": 256 << 20, "in": 480 << 20}

# Runs in the guest: serves connections on PORT until it is killed.
RELAY = f"""
import _socket, os, sys
mode, size, *source = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
listener.bind((0xFFFFFFFF, {PORT}))
listener.listen(1)
os.write(1, b"up")
buffer = memoryview(bytearray(1 << 18))
fd, _ = listener._accept()
reading, writing = os.pipe()
def copy(source, sink, left):
    while left:
        count = os.readv(source, [buffer])
        if not count:
            return
        left -= count
        piece = buffer[:count]
        while piece:
            piece = piece[os.write(sink, piece):]
if mode == "out":
    actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_CLOSE, reading)]
    os.posix_spawn("/bin/busybox", source, {{}}, file_actions=actions)
    os.close(writing)
    copy(reading, fd, size)
else:
    actions = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_CLOSE, writing)]
    pid = os.posix_spawn("/bin/busybox", ["sh", "-c", "cat >/dev/null"], {{}}, file_actions=actions)
    os.close(reading)
    copy(fd, writing, size)
    os.close(writing)
    os.waitpid(pid, 0)
    os.write(fd, b"x")
"""


class CountingSink(Sink):
    """Keeps nothing but the size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, pieces: list[memoryview | bytes]) -> int:
        size = sum(map(len, pieces))
        self.size += size
        return size


def relay(client: Client, address: Address, mode: str, size: int) -> float:
    """Seconds of the unframed relay."""
    session = client.open_session(["python3", "-I", "-S", "-c", RELAY, mode, str(size), *plan_source(size)])
    while not session.receive():
        time.sleep(0.01)
    started = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address.path)
        connection.sendall(f"CONNECT {PORT}\n".encode())
        assert connection.recv(100).startswith(b"OK ")
        left = size
        if mode == "out":
            while left:
                left -= len(connection.recv(1 << 18))
        else:
            block = bytes(1 << 18)
            while left:
                left -= connection.send(block[:left])
            assert connection.recv(1) == b"x"
    seconds = time.perf_counter() - started
    session.close()
    return seconds


def framed(client: Client, mode: str, size: int) -> float:
    """Seconds of a whole session."""
    started = time.perf_counter()
    sink = CountingSink()
    if mode == "out":
        session = client.open_session(plan_source(size))
        Pump(session, BytesSource(b""), {messages.STDOUT: sink}).run()
        assert sink.size == size
    else:
        session = client.open_session(["sh", "-c", "cat >/dev/null"])
        Pump(session, BytesSource(bytes(size)), {}).run()
    session.close()
    return time.perf_counter() - started


def main() -> int:
    address = find_by_name(sys.argv[1])
    client = Client(address)
    for mode, size in SIZE.items():
        turns = [(relay(client, address, mode, size), framed(client, mode, size)) for _ in range(TURNS)]
        bare, whole = (statistics.median(side) for side in zip(*turns, strict=True))
        rates = f"relay {size / bare / 1e6:6.1f} MB/s, vsh {size / whole / 1e6:6.1f} MB/s"
        print(f"{mode:>3}: {rates}, {bare / whole:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
