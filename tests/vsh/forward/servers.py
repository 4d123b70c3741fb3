"""Small real servers and clients for forwards: an echo, a server that counts what it gets, one that speaks first."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE_S = 30.0


class _Server(socketserver.ThreadingMixIn):
    daemon_threads = True
    request_queue_size = 128


class TcpServer(_Server, socketserver.TCPServer):
    allow_reuse_address = True


class UnixServer(_Server, socketserver.UnixStreamServer):
    pass


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1 << 16):
            self.request.sendall(data)


class CountThenAnswer(socketserver.BaseRequestHandler):
    """Answers only once its client has said all: what half-close is for."""

    def handle(self) -> None:
        size = 0
        while data := self.request.recv(1 << 16):
            size += len(data)
        self.request.sendall(b"%d\n" % size)


class Greet(socketserver.BaseRequestHandler):
    """Speaks first and all, then listens until its client has done."""

    def handle(self) -> None:
        self.request.sendall(b"hello " * 20_000)
        self.request.shutdown(socket.SHUT_WR)
        while self.request.recv(1 << 16):
            pass


class Reset(socketserver.BaseRequestHandler):
    """Closes with a reset as soon as it hears something."""

    def handle(self) -> None:
        self.request.recv(1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@contextlib.contextmanager
def serving(handler: type[socketserver.BaseRequestHandler], path: Path | None = None) -> Iterator[Any]:
    """A server, on a UNIX socket when a path is given; its address."""
    server = UnixServer(str(path), handler) if path else TcpServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield str(path) if path else server.socket.getsockname()[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(where: int | str) -> socket.socket:
    """A client of a port of loopback, or of a path."""
    client = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET)
    client.settimeout(DEADLINE_S)
    client.connect(where if isinstance(where, str) else ("127.0.0.1", where))
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while more := client.recv(1 << 16):
        data += more
    return data
