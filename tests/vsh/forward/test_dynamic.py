"""vsh -D with real clients and servers, through a real vshd on a UNIX socket."""

import contextlib
import http.server
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import read_descriptors
from tests.vsh.forward.servers import CountThenAnswer, Echo, Greet, Reset, connect, read_all, serving
from tests.vsh.forward.test_loopbacks import needs_ipv6
from tests.vsh.live import DEADLINE_S, Program, Vshd, ended, read_line, wait_until

GREETING, GREETED = b"\x05\x01\x00", b"\x05\x00"
OPENED = b"\x05\x00\x00\x01" + bytes(6)


@pytest.fixture(scope="module")
def proxy(vshd: Vshd) -> Iterator[tuple[Program, int]]:
    """A running `vsh -N -D`, and its port."""
    with ended(vshd.start("-N", "-D", "0")) as process:
        told = read_line(process.stderr)
        assert told.endswith(" for SOCKS5"), told
        kind, host, port = told.removeprefix("vsh: listening at ").removesuffix(" for SOCKS5").split(":")
        assert (kind, host) == ("tcp", "127.0.0.1")
        yield process, int(port)


@contextlib.contextmanager
def web_server(family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """An HTTP server whose only page is its client's request line; its port."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_: object) -> None: ...

    class Server(http.server.ThreadingHTTPServer):
        address_family = family

    with Server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def curl(*words: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(["curl", "-sS", "-m", "30", *words], capture_output=True, check=False, timeout=DEADLINE_S)


def ask(client: socket.socket, port: int, name: bytes = b"localhost") -> None:
    client.sendall(b"\x05\x01\x00\x03" + bytes((len(name),)) + name + struct.pack("!H", port))


def read_exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def open_through(port: int, target: int) -> socket.socket:
    """A client of the proxy that is connected to a port of the guest."""
    client = connect(port)
    client.sendall(GREETING)
    assert read_exactly(client, 2) == GREETED
    ask(client, target)
    assert read_exactly(client, len(OPENED)) == OPENED
    return client


@pytest.mark.parametrize("flag", ["--socks5-hostname", "--socks5"])
def test_curl_reaches_servers_of_the_guest(proxy: tuple[Program, int], flag: str) -> None:
    with web_server() as one, web_server() as two:
        for server in (one, two):
            done = curl(flag, f"127.0.0.1:{proxy[1]}", f"http://127.0.0.1:{server}/of{server}")
            assert (done.returncode, done.stdout) == (0, b"/of%d" % server), done.stderr


def test_guest_looks_names_up(proxy: tuple[Program, int]) -> None:
    with web_server() as server:
        done = curl("--socks5-hostname", f"127.0.0.1:{proxy[1]}", f"http://localhost:{server}/page")
        assert (done.returncode, done.stdout) == (0, b"/page"), done.stderr
    done = curl("--socks5-hostname", f"127.0.0.1:{proxy[1]}", "http://no-such-name.invalid/")
    # curl's word for a proxy that refuses; its own look-up would end with 6.
    assert done.returncode == 97, done
    line = read_line(proxy[0].stderr)
    assert line.startswith("vsh: -D tcp:127.0.0.1:0: cannot find tcp:no-such-name.invalid:80: "), line


@needs_ipv6
def test_ipv6_address_is_reached(proxy: tuple[Program, int]) -> None:
    with web_server(socket.AF_INET6) as server:
        done = curl("--socks5-hostname", f"127.0.0.1:{proxy[1]}", f"http://[::1]:{server}/six")
        assert (done.returncode, done.stdout) == (0, b"/six"), done.stderr


def test_refusal_of_the_guest_has_its_code(proxy: tuple[Program, int]) -> None:
    with socket.socket() as closed, connect(proxy[1]) as client:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        client.sendall(GREETING)
        assert read_exactly(client, 2) == GREETED
        ask(client, port, b"127.0.0.1")
        # An answer, and an end that is no reset.
        assert read_all(client) == b"\x05\x05\x00\x01" + bytes(6)
        assert read_line(proxy[0].stderr).endswith(f"cannot connect to tcp:127.0.0.1:{port}: Connection refused")


def test_client_may_speak_before_it_has_an_answer(proxy: tuple[Program, int]) -> None:
    with serving(CountThenAnswer) as server, connect(proxy[1]) as client:
        name = b"127.0.0.1"
        request = b"\x05\x01\x00\x03" + bytes((len(name),)) + name + struct.pack("!H", server)
        client.sendall(GREETING + request + b"early words")
        client.sendall(bytes(300_000))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == GREETED + OPENED + b"300011\n"


def test_server_that_speaks_first_is_heard_behind_the_answer(proxy: tuple[Program, int]) -> None:
    with serving(Greet) as server, open_through(proxy[1], server) as client:
        assert read_all(client) == b"hello " * 20_000


def test_reset_of_the_server_is_a_reset_for_the_client(proxy: tuple[Program, int]) -> None:
    with serving(Reset) as server, open_through(proxy[1], server) as client, pytest.raises(ConnectionResetError):
        client.sendall(b"x")
        client.recv(10)
        # Over vsock a reset may come as an end; then what is sent next meets it.
        client.sendall(b"x")
        raise ConnectionResetError


def test_client_that_says_nothing_holds_up_no_other(proxy: tuple[Program, int]) -> None:
    with serving(Echo) as server, connect(proxy[1]) as silent, connect(proxy[1]) as slow:
        slow.sendall(GREETING[:1])
        with open_through(proxy[1], server) as client:
            client.sendall(b"alive")
            assert client.recv(10) == b"alive"
        slow.sendall(GREETING[1:])
        assert read_exactly(slow, 2) == GREETED
        silent.shutdown(socket.SHUT_WR)
        assert silent.recv(1) == b""


def test_stranger_is_told_what_is_spoken_here(proxy: tuple[Program, int]) -> None:
    done = curl("-x", f"http://127.0.0.1:{proxy[1]}", "http://localhost/")
    assert done.returncode == 0, done
    assert read_line(proxy[0].stderr).endswith("its setting is socks5h://, not http://")


def test_connections_leave_no_descriptor(proxy: tuple[Program, int]) -> None:
    with serving(Echo) as server:
        open_through(proxy[1], server).close()
        wait_until(lambda: count_sockets(proxy[0].pid) == 1, "only the listener is left")
        clients = [connect(proxy[1]) for _ in range(20)]
        for client in clients[:10]:
            client.sendall(GREETING)
            assert read_exactly(client, 2) == GREETED
            ask(client, server)
            assert read_exactly(client, len(OPENED)) == OPENED
        for client in clients:
            client.close()
        wait_until(lambda: count_sockets(proxy[0].pid) == 1, "only the listener is left again")


def count_sockets(pid: int) -> int:
    return sum(file.startswith("socket:") for _, file in read_descriptors(pid))


def test_proxy_lives_as_long_as_the_command_at_a_path_of_the_user(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "socks"
    script = "echo up; read line; echo got $line"
    with (
        serving(Echo) as server,
        ended(vshd.start("-D", str(path), "--", "sh", "-c", script, stdin=subprocess.PIPE)) as process,
    ):
        assert read_line(process.stdout) == "up"
        assert path.stat().st_mode & 0o777 == 0o600
        with connect(str(path)) as client:
            client.sendall(GREETING)
            assert read_exactly(client, 2) == GREETED
            ask(client, server)
            assert read_exactly(client, len(OPENED)) == OPENED
            client.sendall(b"there and back")
            assert client.recv(100) == b"there and back"
        process.stdin.write(b"on\n")
        process.stdin.flush()
        assert (process.stdout.read(), process.wait(DEADLINE_S)) == (b"got on\n", 0)
    assert not path.exists()


def test_port_in_use_is_one_line_and_nothing_runs(vshd: Vshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = vshd.run("-D", str(port), "--", "echo", "ran")
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr == b"vsh: cannot listen at tcp:127.0.0.1:%d: Address already in use\n" % port
