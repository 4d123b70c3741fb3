"""`vmkit forward`: forwards that last, for machines that come and go; and the IPv6 mapping in a namespace.

The machine is a fake entry of the registry: a real vshd, and a UNIX socket that speaks the CONNECT convention.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.docs.schemas import check_form
from tests.vsh.forward.servers import CountThenAnswer, Echo, connect, serving
from tests.vsh.forward.test_dynamic import open_through
from tests.vsh.live import CHECKOUT, DEADLINE_S, Program, Vshd, ended, is_listening, read_line, wait_until
from tests.vshd.test_init import needs_namespace
from vmkit.forward.registry import read_kept
from vmkit.forward.start import open_forwards
from vsh.forward.spec import LOCAL, parse_forward

PREFIX = "fd12:3456:789a:1"


def read_line_of(connection: socket.socket) -> bytes:
    """One line, or what came before the end."""
    line = b""
    with contextlib.suppress(ConnectionResetError):
        while not line.endswith(b"\n") and (byte := connection.recv(1)):
            line += byte
    return line


class FakeMachine:
    """A ready machine of the registry whose vsock leads to a vshd and to servers of this test, by port."""

    def __init__(self, runtime: Path, name: str, cid: int, ports: Mapping[int, int | str]) -> None:
        self.directory = runtime / "machines" / name
        self.directory.mkdir(parents=True, mode=0o700)
        self.ports = ports
        self.open: list[socket.socket] = []
        self.lock = (self.directory / "lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.path = self.directory / "vsock.sock"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen(64)
        record = {"schema": 1, "name": name, "cid": cid, "backend": "user", "state": "ready", "pid": 1}
        (self.directory / "machine.json").write_text(json.dumps({**record, "vsock": str(self.path)}))
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            line = read_line_of(connection)
            # A client may leave before it has asked.
            where = self.ports.get(int(line.split()[1])) if line.endswith(b"\n") else None
            if where is None:
                connection.close()
                continue
            connection.sendall(b"OK 1024\n")
            self.open.append(connection)
            threading.Thread(target=self.carry, args=(connection, connect(where)), daemon=True).start()

    @staticmethod
    def carry(left: socket.socket, right: socket.socket) -> None:
        def copy(source: socket.socket, sink: socket.socket) -> None:
            # A program that is killed leaves a reset where it had not read all: the end goes on all the same.
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        for side in (left, right):
            side.settimeout(None)
        other = threading.Thread(target=copy, args=(right, left), daemon=True)
        other.start()
        copy(left, right)
        other.join()
        left.close()
        right.close()

    def end(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        # The keeper removes what is its own at the same time.
        deadline = time.monotonic() + DEADLINE_S
        while self.directory.exists():
            assert time.monotonic() < deadline, f"{self.directory} is still there"
            shutil.rmtree(self.directory, ignore_errors=True)
        self.lock.close()


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(path))
    yield path
    run("--remove", "all")
    assert read_kept() == []


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[dict[int, str]]:
    """A vshd of the guest, by the port it has there."""
    folder = tmp_path / "guest"
    folder.mkdir()
    server = Vshd(folder)
    yield {9001: str(server.path)}
    assert server.stop() == 0


def run(*words: str, timeout_s: float = DEADLINE_S, **options: Any) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "vmkit", "forward", *words]
    return subprocess.run(argv, capture_output=True, check=False, timeout=timeout_s, **options)


def keep(*words: str) -> dict[str, Any]:
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    kept: dict[str, Any] = json.loads(done.stdout)
    return kept


def port_of(kept: dict[str, Any], index: int = 0) -> int:
    return int(kept["listening"][index].rpartition(":")[2])


def test_socks_forward_serves_what_its_clients_name(runtime: Path, guest: dict[int, str]) -> None:
    machine = FakeMachine(runtime, "m", 7, guest)
    with serving(Echo) as port:
        kept = keep("m", "-D", "0")
        assert kept["forwards"] == ["-D tcp:127.0.0.1:0"]
        with open_through(port_of(kept), port) as client:
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"
        run("--remove", "1")
    machine.end()


def test_forward_outlives_the_command_and_is_listed_and_removed(runtime: Path, guest: dict[int, str]) -> None:
    machine = FakeMachine(runtime, "m", 7, guest)
    with serving(Echo) as port:
        kept = keep("m", "-L", f"0:localhost:{port}")
        with connect(port_of(kept)) as client:
            client.sendall(b"hello")
            assert client.recv(10) == b"hello"
            listed = json.loads(run("--list", "--json").stdout)
            assert [(entry["number"], entry["machine"]) for entry in listed] == [(1, "m")]
            assert run("--remove", "1").stdout == b"forward 1 is gone\n"
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(10) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(port_of(kept))
    assert list((runtime / "forwards").iterdir()) == []
    machine.end()


def test_forward_serves_the_next_machine_of_its_name(runtime: Path, guest: dict[int, str]) -> None:
    with serving(Echo) as port:
        machine = FakeMachine(runtime, "m", 7, guest)
        kept = keep("m", "-L", f"0:localhost:{port}", "-R", f"0:{port}", "-R", f"vsock:445:{port}")
        machine.end()
        with contextlib.suppress(ConnectionResetError), connect(port_of(kept)) as client:
            assert client.recv(1) == b""
        assert b"no machine named 'm' is running" in run("--list").stderr
        machine = FakeMachine(runtime, "m", 8, guest)
        with connect(port_of(kept)) as client:
            client.sendall(b"again")
            assert client.recv(10) == b"again"
        path = Path(f"{machine.path}_445")
        wait_until(lambda: is_listening(path), "the host's vsock port is bound for the new machine")
        with connect(str(path)) as client:
            client.sendall(b"by vsock")
            assert client.recv(10) == b"by vsock"
        path.unlink()
        run("--remove", "1")
        machine.end()


def test_listener_of_the_guest_comes_back(runtime: Path, guest: dict[int, str], tmp_path: Path) -> None:
    there = tmp_path / "there.sock"
    with serving(CountThenAnswer) as port:
        machine = FakeMachine(runtime, "m", 7, guest)
        keep("m", "-R", f"{there}:{port}")
        for _ in range(2):
            # The way back is the host's own: the vshd here is no guest, and reaches the path itself.
            assert there.exists()
            machine.end()
            wait_until(lambda: not there.exists(), "the guest's vshd has noticed")
            machine = FakeMachine(runtime, "m", 7, guest)
            wait_until(there.exists, "it listens again")
        run("--remove", "all")
        machine.end()


def test_killed_keeper_leaves_nothing_that_counts(runtime: Path, guest: dict[int, str]) -> None:
    machine = FakeMachine(runtime, "m", 7, guest)
    kept = keep("m", "-L", "0:localhost:1")
    os.kill(kept["pid"], signal.SIGKILL)
    wait_until(lambda: not read_kept(), "nobody holds its lock")
    assert keep("m", "-L", "0:localhost:1")["number"] == 1
    machine.end()


def test_forward_to_a_name_without_a_machine_prints_that(runtime: Path) -> None:
    done = run("later", "-L", "0:localhost:1")
    assert b"no machine named 'later' is running" in done.stderr
    run("--remove", "all")


def test_forwards_of_a_block_end_with_it(runtime: Path) -> None:
    with serving(Echo), open_forwards("later", [parse_forward(LOCAL, "0:localhost:1")]) as kept:
        assert [entry.number for entry in read_kept()] == [kept.number]
    assert read_kept() == []


DAEMON = """
import os, sys, traceback
from pathlib import Path
from vmkit.forward.start import open_forwards
from vsh.forward.spec import LOCAL, parse_forward
os.closerange(0, 3)
try:
    with open_forwards("later", [parse_forward(LOCAL, "0:localhost:1")]) as kept:
        Path(sys.argv[1]).write_text(f"kept {kept.number}")
except BaseException:
    Path(sys.argv[1]).write_text(traceback.format_exc())
"""


def test_forwards_of_a_daemon_that_has_closed_its_standard_streams(runtime: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", DAEMON, str(tmp_path / "result")], timeout=DEADLINE_S, check=True)
    assert (tmp_path / "result").read_text() == "kept 1"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 64, b"give one of"),
        (["--list", "--ipv6"], 64, b"give one of"),
        (["-L", "1:2"], 1, b"no machine is running"),
        (["m", "-L", "nonsense"], 64, b"bad forward"),
        (["m", "-R", "1:2"], 1, b"no machine named 'm'"),
        (["m", "x", "-L", "1:2"], 64, b"give one machine name"),
        (["--remove", "7"], 1, b"there is no forward 7"),
        (["--prefix", "fd12::", "--list"], 64, b"go with --ipv6"),
        (["--ipv6"], 64, b"needs a command"),
        (["--ipv6", "--prefix", "fe80::", "true"], 64, b"no unique-local prefix"),
    ],
)
def test_usage(runtime: Path, words: list[str], status: int, text: bytes) -> None:
    done = run(*words)
    assert (done.returncode, text in done.stderr) == (status, True), done


def test_port_in_use_is_told_and_nothing_is_kept(runtime: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("m", "-L", f"{taken.getsockname()[1]}:localhost:1")
    assert done.returncode == 1
    assert b"Address already in use" in done.stderr
    assert read_kept() == []


def test_other_file_where_a_forward_should_listen_stays(runtime: Path, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    done = run("m", "-L", f"unix:{path}:localhost:1")
    assert done.returncode == 1
    assert b"the path is a regular file, not a socket\nhint: choose another path" in done.stderr
    assert path.read_text() == "precious"
    assert read_kept() == []


@pytest.mark.parametrize("kind", ["file", "bound"])
def test_other_file_at_the_path_of_a_vsock_port_stays(runtime: Path, guest: dict[int, str], kind: str) -> None:
    machine = FakeMachine(runtime, "m", 7, guest)
    path = Path(f"{machine.path}_445")
    with socket.socket(socket.AF_UNIX) as other:
        if kind == "file":
            path.write_text("precious")
        else:
            other.bind(str(path))
        before = os.lstat(path)
        done = run("m", "-R", "vsock:445:1")
        assert done.returncode == 1
        assert b"cannot listen on vsock port 445 of this host for this machine: the " in done.stderr
        assert os.path.samestat(os.lstat(path), before)
    machine.end()


def test_relative_path_is_of_the_folder_where_it_was_asked_for(runtime: Path, tmp_path: Path) -> None:
    """The process that keeps the forward works in another one."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    kept = json.loads(run("m", "-L", "unix:here:localhost:1", "--json", cwd=tmp_path, env=environment).stdout)
    assert kept["listening"] == [f"unix:{tmp_path}/here"]
    assert (tmp_path / "here").is_socket()


CLIENT = """
import errno, os, socket, sys
address = f"{os.environ['VMKIT_PREFIX']}::{int(sys.argv[1]):x}"
for port in sys.argv[2:]:
    try:
        with socket.create_connection((address, int(port)), 10) as client:
            client.sendall(bytes(100_000))
            client.shutdown(socket.SHUT_WR)
            print(client.recv(100).decode().strip())
    except OSError as error:
        # A reset that comes before the shutdown makes that fail.
        if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
            raise
        print("reset")
print(os.getuid())
"""


@needs_namespace
def test_every_port_of_a_cid_is_an_address_in_the_namespace(runtime: Path) -> None:
    with serving(CountThenAnswer) as port:
        machine = FakeMachine(runtime, "m", 0x2A, {1: port, 445: port, 65535: port})
        words = ("--ipv6", "--prefix", f"{PREFIX}::/64", "--", sys.executable, "-c", CLIENT)
        done = run(*words, str(0x2A), "1", "445", "65535", "80")
        assert done.stdout.splitlines()[:4] == [b"100000"] * 3 + [b"reset"], done
        assert b"nothing listens on port 80 of machine 'm'" in done.stderr
        assert done.stdout.splitlines()[4].split()[0] == b"%d" % os.getuid()
        stranger = run(*words, "77", "80")
        assert stranger.stdout.startswith(b"reset")
        machine.end()


@needs_namespace
def test_status_of_the_command_is_the_status(runtime: Path) -> None:
    assert run("--ipv6", "--", "sh", "-c", "exit 7").returncode == 7
    assert run("--ipv6", "--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    done = run("--ipv6", "--", "nosuchcommand")
    assert (done.returncode, b"command not found" in done.stderr) == (127, True)


@needs_namespace
def test_prefix_stays_ones_own(runtime: Path) -> None:
    script = "echo $VMKIT_PREFIX"
    first, second = (run("--ipv6", "--", "sh", "-c", script).stdout for _ in range(2))
    assert first == second
    assert first.startswith(b"fd")


@needs_namespace
def test_host_wide_mapping_is_removed_at_the_end(runtime: Path) -> None:
    """In a namespace that plays the host."""
    show = "nft list tables; ip -6 route show table local | grep fd12"
    inner = (
        f"{sys.executable} -m vmkit forward --ipv6 --host-wide --prefix fd12::/64 -- sh -c '{show}'; echo end; {show}"
    )
    argv = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", f"ip link set lo up; {inner}"]
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=DEADLINE_S, env=env)
    during, _, after = done.stdout.partition("end\n")
    assert "table ip6 vmkit_vsock" in during, done
    assert "fd12::/64" in during
    assert after == ""


def start_auto(*words: str) -> Program:
    argv = [sys.executable, "-m", "vmkit", "forward", "m", "--auto", "--json", *words]
    return Program(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def read_event(process: Program) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(read_line(process.stdout))
    check_form("ports", event)
    return event


def test_ports_of_the_guest_come_and_go_by_themselves(runtime: Path, guest: dict[int, str]) -> None:
    """The guest is this host: what it listens on is in use here, and so is at the next number."""
    machine = FakeMachine(runtime, "m", 7, guest)
    with contextlib.ExitStack() as server:
        port = server.enter_context(serving(Echo))
        with ended(start_auto("--include", f"{port},1", "--exclude", "1")) as process:
            opened = read_event(process)
            assert (opened["event"], opened["port"]) == ("opened", port)
            assert opened["reason"] == f"port {port} of this host is in use"
            here = int(opened["listening"][0].rpartition(":")[2])
            with connect(here) as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
            server.close()
            closed = read_event(process)
            assert (closed["event"], closed["port"], closed["listening"]) == ("closed", port, opened["listening"])
            with pytest.raises(ConnectionRefusedError):
                connect(here)
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGINT
            assert process.stderr.read() == b"vmkit: forwarding the ports of m until Ctrl-C\n"
            assert process.stdout.read() == b""
    machine.end()


def test_ports_outlive_a_restart_of_vshd(runtime: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    vshd = Vshd(folders[0])
    ports = {9001: str(vshd.path)}
    machine = FakeMachine(runtime, "m", 7, ports)
    try:
        with serving(Echo) as first, contextlib.ExitStack() as later, socket.socket() as second:
            second.bind(("127.0.0.1", 0))
            other = second.getsockname()[1]
            process = later.enter_context(ended(start_auto("--include", f"{first},{other}")))
            opened = read_event(process)
            assert opened["port"] == first
            assert vshd.stop() == 0
            vshd = Vshd(folders[1])
            ports[9001] = str(vshd.path)
            second.listen()
            event = read_event(process)
            # Nothing was closed meanwhile.
            assert (event["event"], event["port"]) == ("opened", other)
            with connect(int(opened["listening"][0].rpartition(":")[2])) as client:
                client.sendall(b"hello")
                assert client.recv(10) == b"hello"
        machine.end()
    finally:
        assert vshd.stop() == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--auto", "--include", "x"], "'x' names no ports"),
        (["m", "--include", "80", "-L", "1:2"], "--include and --exclude go with --auto"),
        (["m", "--auto", "-D", "1"], "give one of: -L, -R or -D, --auto, --list, --remove, --ipv6"),
        (["m", "n", "--auto"], "give one machine name"),
        (["nobody", "--auto"], "no machine named 'nobody' is running"),
    ],
)
def test_wrong_words_of_auto_are_named(runtime: Path, guest: dict[int, str], words: list[str], said: str) -> None:
    machine = FakeMachine(runtime, "m", 7, guest)
    done = run(*words)
    assert (done.returncode != 0, done.stdout) == (True, b"")
    assert done.stderr.decode().startswith(f"vmkit: {said}"), done.stderr
    machine.end()
