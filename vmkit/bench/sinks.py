"""The race's own programs in guest and host: a source, sinks, and the plainest relays in Python.

They are scripts as text, for a guest whose Python has the standard library's core. The host's own parts are functions.
"""

import socket
import threading
import time
from collections.abc import Callable

from vmkit.errors import HostError

READ_BYTES = 1 << 18
ANSWER = b"x"
Connect = Callable[[], socket.socket]
CONNECT_TIMEOUT_S = 60.0
# As much as a channel moves at once, so that it is not the source that is measured: busybox's head writes through
# stdio, byte by byte, which under emulation is 13 MB/s at most, to whomever.
SOURCE_BLOCK_BYTES = 128 << 10


def plan_source(size: int) -> list[str]:
    """Returns the guest's fastest command that writes `size` bytes to stdout, and nothing to stderr.

    Raises ValueError when `size` is not a number of whole blocks.
    """
    count, rest = divmod(size, SOURCE_BLOCK_BYTES)
    if rest:
        raise ValueError(f"{size} bytes are no multiple of {SOURCE_BLOCK_BYTES}")
    return ["dd", "if=/dev/zero", f"bs={SOURCE_BLOCK_BYTES}", f"count={count}", "status=none"]


# Swallows connections of a vsock and a TCP port (the same number), and answers each end with one byte. Of any address:
# one guest of the race has a network.
SINK = f"""
import socket, sys, threading
port = int(sys.argv[1])
def serve(connection):
    buffer = memoryview(bytearray({READ_BYTES}))
    while connection.recv_into(buffer):
        pass
    connection.sendall({ANSWER!r})
    connection.close()
def listen(family, address):
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1) if family == socket.AF_INET else None
    listener.bind(address)
    listener.listen(16)
    def accept():
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
listen(socket.AF_VSOCK, (0xFFFFFFFF, port))
listen(socket.AF_INET, ("0.0.0.0", port))
print("up", flush=True)
threading.Event().wait()
"""

# From a vsock port to a TCP port: read and write, one thread for each way, nothing else.
RELAY = f"""
import socket, sys, threading
listener = socket.socket(socket.AF_VSOCK)
listener.bind((0xFFFFFFFF, int(sys.argv[1])))
listener.listen(16)
def copy(source, sink):
    buffer = memoryview(bytearray({READ_BYTES}))
    while size := source.recv_into(buffer):
        sink.sendall(buffer[:size])
    sink.shutdown(socket.SHUT_WR)
print("up", flush=True)
while True:
    left, _ = listener.accept()
    right = socket.create_connection(("127.0.0.1", int(sys.argv[2])))
    for pair in ((left, right), (right, left)):
        threading.Thread(target=copy, args=pair, daemon=True).start()
"""

# The other end of what a session does, without framing: a command's output, or its input, and the bare connection.
PIPE = f"""
import _socket, os, sys
listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
listener.bind((0xFFFFFFFF, int(sys.argv[1])))
listener.listen(4)
os.write(1, b"up\\n")
buffer = memoryview(bytearray({READ_BYTES}))
def copy(source, sink):
    while count := os.readv(source, [buffer]):
        piece = buffer[:count]
        while piece:
            piece = piece[os.write(sink, piece):]
while True:
    fd, _ = listener._accept()
    way, *source = os.read(fd, 256).decode().split()
    reading, writing = os.pipe()
    if way == "out":
        actions = [(os.POSIX_SPAWN_DUP2, writing, 1), (os.POSIX_SPAWN_CLOSE, reading)]
        pid = os.posix_spawn("/bin/busybox", source, {{}}, file_actions=actions)
        os.close(writing)
        copy(reading, fd)
        os.close(reading)
    else:
        actions = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_CLOSE, writing)]
        pid = os.posix_spawn("/bin/busybox", ["sh", "-c", "cat >/dev/null"], {{}}, file_actions=actions)
        os.close(reading)
        os.write(fd, b"x")
        copy(fd, writing)
        os.close(writing)
    os.waitpid(pid, 0)
    if way == "in":
        os.write(fd, b"x")
    os.close(fd)
"""


def time_sending(connection: socket.socket, size: int) -> float:
    """Times a sink until it has read and confirmed `size` bytes. Closes the connection. Raises HostError."""
    block = bytes(READ_BYTES)
    connection.settimeout(CONNECT_TIMEOUT_S)
    started_s = time.perf_counter()
    with connection:
        left = size
        while left:
            left -= connection.send(block[: min(left, READ_BYTES)])
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(16) != ANSWER:
            raise HostError("the sink in the guest did not swallow all")
    return time.perf_counter() - started_s


def time_pipe(connection: socket.socket, way: str, size: int) -> float:
    """Returns the seconds of one transfer with PIPE. way: "out" or "in"."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    buffer = bytearray(READ_BYTES)
    started_s = time.perf_counter()
    with connection:
        connection.sendall(" ".join([way, *plan_source(size)]).encode())
        left = size
        if way == "out":
            while left:
                count = connection.recv_into(buffer)
                if not count:
                    raise HostError("the guest's pipe ended early")
                left -= count
            return time.perf_counter() - started_s
        if connection.recv(1) != ANSWER:
            raise HostError("the guest's pipe did not start")
        while left:
            left -= connection.send(memoryview(buffer)[: min(left, READ_BYTES)])
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1) != ANSWER:
            raise HostError("the guest's pipe did not swallow all")
    return time.perf_counter() - started_s


class PlainRelay:
    """A TCP port of loopback. Copies its connections to those that `connect` opens: RELAY's other half."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                left, _ = self._listener.accept()
            except OSError:
                return
            right = self._connect()
            right.settimeout(None)
            for source, sink in ((left, right), (right, left)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    buffer = memoryview(bytearray(READ_BYTES))
    try:
        while size := source.recv_into(buffer):
            sink.sendall(buffer[:size])
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()
