"""Forwards of a real machine: its vsock ports, TCP ports and UNIX sockets from here, and ours from there."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from tests.vsh.forward.servers import CountThenAnswer, Echo, connect, read_all, serving
from tests.vsh.live import wait_until

BIN = Path(sys.executable).parent
DEADLINE_S = 60

# Runs in the guest: answers each connection, once it has said all, with how much that was.
SERVER = """
import socket, sys, threading
kind, where = sys.argv[1:]
family = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX, "vsock": socket.AF_VSOCK}[kind]
server = socket.socket(family)
host = {"tcp": "127.0.0.1", "tcp6": "::1", "vsock": -1}.get(kind)
server.bind(where if kind == "unix" else (host, int(where)))
server.listen(64)
print("up", flush=True)
while True:
    connection, _ = server.accept()
    def serve(connection=connection):
        size = 0
        while data := connection.recv(1 << 16):
            size += len(data)
        connection.sendall(b"%d\\n" % size)
        connection.close()
    threading.Thread(target=serve).start()
"""
CLIENT = """
import socket, sys
kind, where, size = sys.argv[1:]
family = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX, "vsock": socket.AF_VSOCK}[kind]
client = socket.socket(family)
host = {"tcp": "127.0.0.1", "tcp6": "::1", "vsock": 2}.get(kind)
client.connect(where if kind == "unix" else (host, int(where)))
client.sendall(bytes(int(size)))
client.shutdown(socket.SHUT_WR)
print(client.recv(100).decode().strip())
"""


@contextlib.contextmanager
def running(*words: str, stream: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A vsh that runs, and the first line it writes on `stream`."""
    process = subprocess.Popen(
        [str(BIN / "vsh"), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        source = getattr(process, stream)
        assert select.select([source], [], [], DEADLINE_S)[0], "nothing said"
        yield process, source.readline().decode().strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)


def port_of(line: str) -> int:
    return int(line.split(" at ")[1].split(" for ", maxsplit=1)[0].rpartition(":")[2])


@pytest.mark.parametrize(
    ("kind", "where"), [("tcp", "7001"), ("tcp6", "7006"), ("unix", "/tmp/server"), ("vsock", "7001")]
)
def test_local_forward_reaches_a_server_of_the_guest(ready: str, kind: str, where: str) -> None:
    # localhost is a server's address wherever it listens: at 127.0.0.1 or at ::1.
    target = {"tcp": f"localhost:{where}", "tcp6": f"localhost:{where}", "unix": where, "vsock": where}[kind]
    machine = ("--vm_name", ready)
    with running(*machine, "--", "python3", "-c", SERVER, kind, where, stream="stdout") as (_, line):
        assert line == "up"
        with running(*machine, "-v", "-N", "-L", f"0:{target}", stream="stderr") as (_, told):
            for size in (0, 3, 2_000_000):
                with connect(port_of(told)) as client:
                    client.sendall(bytes(size))
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(client) == b"%d\n" % size


@pytest.mark.parametrize(
    ("kind", "where", "listen"),
    [
        ("tcp", "7002", "7002"),
        # The guest's resolver gives ::1 first for localhost.
        ("tcp6", "7007", "7007"),
        ("tcp", "7008", "localhost:7008"),
        ("unix", "/tmp/there", "/tmp/there"),
        ("vsock", "7002", "vsock:7002"),
    ],
)
def test_remote_forward_reaches_a_server_of_the_host(ready: str, vsh: Run, kind: str, where: str, listen: str) -> None:
    with (
        serving(CountThenAnswer) as port,
        running("--vm_name", ready, "-v", "-N", "-R", f"{listen}:{port}", stream="stderr"),
    ):
        for size in (0, 2_000_000):
            done = vsh("--vm_name", ready, "--", "python3", "-c", CLIENT, kind, where, str(size))
            assert done.stdout == b"%d\n" % size, done.stderr.decode()


def test_strangers_of_the_guest_are_turned_away(ready: str, vsh: Run, folders: Path) -> None:
    """The host's port of a listening forward is open to every program of the guest; without the token it is no use."""
    with (
        serving(Echo) as port,
        running("--vm_name", ready, "-v", "-N", "-R", f"7003:{port}", stream="stderr") as (process, _),
    ):
        names = os.listdir(folders / "runtime/machines" / ready)
        ports = [name.rpartition("_")[2] for name in names if name.startswith("vsock.sock_")]
        # vshd's own port for READY is no forward's.
        (host_port,) = [port for port in ports if port.isdecimal() and int(port) > 9999]
        done = vsh("--vm_name", ready, "--", "python3", "-c", CLIENT, "vsock", host_port, "100")
        assert b"100" not in done.stdout
        assert process.stderr is not None
        assert b"it is not from the guest's vshd" in process.stderr.readline()


def ask_for_size(port: int, size: int) -> bytes:
    with connect(port) as client:
        client.sendall(bytes(size))
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


def test_one_session_of_the_guest_serves_all_connections(ready: str, vsh: Run) -> None:
    """In turn and 50 at once."""
    machine = ("--vm_name", ready)
    with running(*machine, "--", "python3", "-c", SERVER, "tcp", "7011", stream="stdout") as (_, line):
        assert line == "up"
        with running(*machine, "-v", "-N", "-L", "0:localhost:7011", stream="stderr") as (_, told):
            port = port_of(told)
            for size in range(30):
                assert ask_for_size(port, size) == b"%d\n" % size
            with ThreadPoolExecutor(50) as pool:
                answers = list(pool.map(lambda size: ask_for_size(port, size), range(50)))
            assert answers == [b"%d\n" % size for size in range(50)]
    end = rb"user root: closed, after 80 connections, .*: forward to tcp:localhost:7011, with branches\n"
    wait_until(lambda: re.search(end, vsh(*machine, "--", "dmesg").stdout), "one session has served all of them")


def test_refused_by_the_guest_is_one_line(ready: str) -> None:
    for target, text in (
        ("localhost:9", b"Connection refused"),
        ("9", b"nothing listens on port 9"),
        ("/nowhere", b"No such file"),
    ):
        with running("--vm_name", ready, "-v", "-N", "-L", f"0:{target}", stream="stderr") as (process, told):
            with contextlib.suppress(ConnectionResetError), connect(port_of(told)) as client:
                assert client.recv(1) == b""
            assert process.stderr is not None
            assert text in process.stderr.readline()
