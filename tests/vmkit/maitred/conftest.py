"""A running server of maitred, and three clients that speak to it: grpcio's, grpclib's with protobuf, and ours."""

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.exceptions import GRPCError

from tests.vmkit.maitred.google import CLASSES, METHODS
from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Program, ended
from vmkit.errors import MachineError
from vmkit.maitred import messages
from vmkit.maitred.client import Maitred
from vsh.address import Address

FOLDER = Path(__file__).parent
Call = Callable[..., Any]


class RefusedError(Exception):
    """The server answered with an error of gRPC."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


class ServerProgram:
    """The server. notes: what it did to its guest, a line each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "maitred.sock"
        self._notes = folder / "notes"
        self.program = start("server_program", str(self.path), str(self._notes))
        assert self.program.stdout.readline() == b"listening\n", self.program.communicate()[1].decode()

    @property
    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []


def start(module: str, *words: str) -> Program:
    return Program(
        [sys.executable, "-m", f"tests.vmkit.maitred.{module}", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=CHECKOUT,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    server = ServerProgram(tmp_path_factory.mktemp("maitred"))
    with ended(server.program):
        yield server


@pytest.fixture(scope="module")
def grpcio_program(running: ServerProgram) -> Iterator[Program]:
    """It takes a second to start."""
    with ended(start("grpcio_program", str(running.path))) as program:
        yield program


@pytest.fixture
def client(running: ServerProgram, tmp_path: Path) -> Iterator[Maitred]:
    """Ours, through a vsock that is a UNIX socket, as a machine has it."""
    with front(tmp_path / "vsock.sock", running.path) as address, Maitred(address, timeout_s=DEADLINE_S) as opened:
        yield opened


@contextlib.contextmanager
def front(path: Path, target: Path, refusals: int = 0) -> Iterator[Address]:
    """A machine's vsock, of which port 8888 leads to `target`. refusals: how many connections end before it listens."""
    threads = []
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(str(path))
        listening.listen()

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        def serve() -> None:
            with contextlib.suppress(OSError):
                for number in itertools.count():
                    connection = stack.enter_context(listening.accept()[0])
                    assert connection.recv(100) == b"CONNECT 8888\n"
                    if number < refusals:
                        connection.close()
                        continue
                    connection.sendall(b"OK 1024\n")
                    inner = stack.enter_context(socket.socket(socket.AF_UNIX))
                    inner.connect(str(target))
                    for pair in ((connection, inner), (inner, connection)):
                        threads.append(threading.Thread(target=carry, args=pair))
                        threads[-1].start()

        accepting = threading.Thread(target=serve)
        accepting.start()
        try:
            yield Address.hybrid(str(path))
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            accepting.join(DEADLINE_S)
            for thread in threads:
                thread.join(DEADLINE_S)


@pytest.fixture(params=["grpcio", "grpclib", "ours"])
def call(request: pytest.FixtureRequest, running: ServerProgram) -> Iterator[Call]:
    """call(method, field=value ...): the answer, of Google's classes. Raises RefusedError."""
    if request.param == "grpclib":
        yield lambda method, **fields: asyncio.run(call_with_grpclib(running.path, method, fields))
    elif request.param == "ours":
        opened = request.getfixturevalue("client")
        yield lambda method, **fields: call_with_ours(opened, method, fields)
    else:
        program = request.getfixturevalue("grpcio_program")
        yield lambda method, **fields: call_with_grpcio(program, method, fields)


def make_request(method: str, fields: dict[str, Any]) -> Any:
    return CLASSES[METHODS[method][0]](**fields)


def call_with_grpcio(program: Program, method: str, fields: dict[str, Any]) -> Any:
    program.stdin.write(f"{method} {make_request(method, fields).SerializeToString().hex()}\n".encode())
    program.stdin.flush()
    status, _, rest = program.stdout.readline().decode().rstrip("\n").partition(" ")
    if status != "OK":
        raise RefusedError(status, rest)
    return CLASSES[METHODS[method][1]].FromString(bytes.fromhex(rest))


async def call_with_grpclib(path: Path, method: str, fields: dict[str, Any]) -> Any:
    reply = CLASSES[METHODS[method][1]]
    async with Channel(path=str(path)) as channel:
        unary: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(
            channel, f"/vm_tools.Maitred/{method}", CLASSES[METHODS[method][0]], reply
        )
        try:
            return await unary(make_request(method, fields), timeout=DEADLINE_S)
        except GRPCError as error:
            raise RefusedError(error.status.name, error.message or "") from error


def call_with_ours(client: Maitred, method: str, fields: dict[str, Any]) -> Any:
    request = getattr(messages, METHODS[method][0])()
    request.merge(make_request(method, fields).SerializeToString())
    try:
        reply = client.call(method, request)
    except MachineError as error:
        raise RefusedError(error.details, error.brief) from error
    return CLASSES[METHODS[method][1]].FromString(reply.encode())
