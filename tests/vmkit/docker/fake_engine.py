"""A Docker engine that is a real HTTP server on a UNIX socket and plays one scenario; its containers are processes.

It speaks the calls of the Engine API that vmkit makes, and remembers them.
"""

import contextlib
import io
import json
import os
import re
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

API_VERSION = "1.44"
IMAGE = "sha256:" + "ab" * 32
CONTAINER = "cd" * 32


@dataclass
class Scenario:
    """build: the messages of a build. build_dies: the connection breaks behind them. others: containers that are there.

    results: what is in the container's /results. create_error: what the engine answers to ContainerCreate.
    status: what it calls the status of a command that has ended; None: the true one.
    """

    build: list[dict[str, object]] = field(default_factory=list)
    build_dies: bool = False
    others: list[dict[str, object]] = field(default_factory=list)
    results: dict[str, bytes] = field(default_factory=dict)
    create_error: tuple[int, str] | None = None
    status: int | None = None


# The image has our programs on its PATH; a run of the tests need not.
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"


class FakeEngine:
    """What was asked of it, and the processes it runs."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.calls: list[str] = []
        self.created: dict[str, Any] = {}
        self.context: list[str] = []
        self.build_query: dict[str, list[str]] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.attached = threading.Event()
        self.started = threading.Event()
        self.removed: list[str] = []

    def start(self) -> None:
        command = [sys.executable if word == "python3" else word for word in self.created["Cmd"]]
        variables = dict(line.split("=", 1) for line in self.created["Env"])
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env={**os.environ, "PATH": PATH, **variables},
            process_group=0,
        )
        self.started.set()

    def kill(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    engine: FakeEngine


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    @property
    def engine(self) -> FakeEngine:
        return self.server.engine

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if path == "/version":
            self._answer({"ApiVersion": API_VERSION, "MinAPIVersion": "1.24"})
        elif path == "/containers/json":
            self._answer(self.engine.scenario.others)
        elif path.startswith("/images/"):
            self._answer({"Id": IMAGE, "Size": 426_000_000})
        elif path.endswith("/archive"):
            self._send_archive()
        else:
            self._answer({"message": f"page not found: {path}"}, 404)

    def do_POST(self) -> None:
        path = self._path()
        if path == "/build":
            self._build()
        elif path == "/containers/create":
            self.engine.created = json.loads(self._body())
            error = self.engine.scenario.create_error
            self._answer({"message": error[1]} if error else {"Id": CONTAINER}, error[0] if error else 201)
        elif path.endswith("/attach"):
            self._attach()
        elif path.endswith("/start"):
            self.engine.start()
            self._answer(None, 204)
        elif path.endswith("/wait"):
            assert self.engine.process is not None
            status = self.engine.process.wait(30)
            lie = self.engine.scenario.status
            self._answer({"StatusCode": lie if lie is not None else status if status >= 0 else 128 - status})
        elif path.endswith("/kill"):
            self.engine.kill(2)
            self._answer(None, 204)
        else:
            self._answer({"message": f"page not found: {path}"}, 404)

    def do_DELETE(self) -> None:
        path = self._path()
        self.engine.removed.append(path.rpartition("/")[2])
        self.engine.kill(9)
        self._answer(None, 204)

    def _path(self) -> str:
        path = re.sub(r"^/v\d+\.\d+", "", urlparse(self.path).path)
        self.engine.calls.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, value: object, status: int = 200) -> None:
        body = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _build(self) -> None:
        self.engine.build_query = parse_qs(urlparse(self.path).query)
        with tarfile.open(fileobj=io.BytesIO(self._body())) as archive:
            self.engine.context = archive.getnames()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for message in self.engine.scenario.build:
            data = json.dumps(message).encode() + b"\r\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        if not self.engine.scenario.build_dies:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def _attach(self) -> None:
        self.wfile.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        self.engine.attached.set()
        assert self.engine.started.wait(30)
        process = self.engine.process
        assert process is not None and process.stdout and process.stderr and process.stdin
        lock = threading.Lock()
        copies = [
            threading.Thread(target=self._copy_out, args=(number, stream, lock))
            for number, stream in ((1, process.stdout), (2, process.stderr))
        ]
        for copy in copies:
            copy.start()
        threading.Thread(target=self._copy_in, args=(process.stdin,), daemon=True).start()
        for copy in copies:
            copy.join()
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _copy_out(self, number: int, stream: Any, lock: threading.Lock) -> None:
        while data := os.read(stream.fileno(), 4096):
            # A client that is gone does not stop a container's output.
            with lock, contextlib.suppress(OSError):
                self.connection.sendall(struct.pack(">BxxxL", number, len(data)) + data)

    def _copy_in(self, stream: Any) -> None:
        with contextlib.suppress(OSError):
            while data := self.connection.recv(4096):
                stream.write(data)
                stream.flush()
        with contextlib.suppress(OSError):
            stream.close()

    def _send_archive(self) -> None:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in self.engine.scenario.results.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        self.send_response(200)
        self.send_header("X-Docker-Container-Path-Stat", "e30=")
        self.send_header("Content-Length", str(len(packed.getvalue())))
        self.end_headers()
        self.wfile.write(packed.getvalue())


@contextlib.contextmanager
def open_fake_engine(socket: Path, scenario: Scenario) -> Iterator[FakeEngine]:
    """An engine at `socket` for a block; what it still runs is killed at the end."""
    engine = FakeEngine(scenario)
    with _Server(str(socket), _Handler) as server:
        server.engine = engine
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield engine
        finally:
            engine.started.set()
            if engine.process is not None and engine.process.poll() is None:
                engine.process.kill()
            server.shutdown()
            thread.join()
