"""-L, -R, -N and --proxy with real servers, through a real vshd on a UNIX socket."""

import contextlib
import hashlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, Unpack

import pytest

from tests.vsh.forward.servers import CountThenAnswer, Echo, Greet, Reset, connect, read_all, serving
from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Program, StartOptions, StartVshd, Vshd, ended, read_line, wait_until


class StartForward(Protocol):
    """The fixture forward."""

    def __call__(self, *words: str, count: int = 1, **options: Unpack[StartOptions]) -> tuple[Program, list[Any]]: ...


@pytest.fixture
def forward(vshd: Vshd) -> Iterator[StartForward]:
    """Starts `vsh -N ...`; gives the process and where each forward listens."""
    with contextlib.ExitStack() as stack:

        def start(*words: str, count: int = 1, **options: Any) -> tuple[Program, list[Any]]:
            process = stack.enter_context(ended(vshd.start("-v", "-N", *words, **options)))
            places = [read_line(process.stderr).split(" at ")[1].split(" for ")[0] for _ in range(count)]
            return process, [find_place(place) for place in places]

        yield start
    wait_until(lambda: not vshd.children(), "the forwards' processes have ended")


def find_place(place: str) -> int | str:
    kind, _, rest = place.partition(":")
    return rest if kind == "unix" else int(rest.rpartition(":")[2])


def test_local_forward_to_a_tcp_port_carries_both_ways(forward: StartForward) -> None:
    with serving(Echo) as port:
        _, [here] = forward("-L", f"0:localhost:{port}")
        with connect(here) as client:
            client.sendall(b"there and back")
            assert client.recv(100) == b"there and back"


def test_vsock_port_of_the_host_that_is_left_to_us_is_chosen_and_told(tmp_path: Path) -> None:
    """A hybrid vsock's host port is a path; the machine itself need not answer for it."""
    words = [sys.executable, "-m", "vsh", f"--uds={tmp_path / 'vm'}", "-N"]
    with serving(Echo) as port:
        argv = [*words, "-R", f"vsock:0:{port}", "-R", f"vsock:0:{port}"]
        with ended(Program(argv, env=ENVIRONMENT, stderr=subprocess.PIPE)) as process:
            told = [read_line(process.stderr) for _ in range(2)]
            found = [re.fullmatch(rf"vsh: this host listens at vsock:(\d+) for tcp:127.0.0.1:{port}", x) for x in told]
            chosen = [int(match[1]) for match in found if match]
            assert len(set(chosen)) == 2, told
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(tmp_path / f"vm_{chosen[1]}"))
                guest.sendall(b"there and back")
                assert guest.recv(100) == b"there and back"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_half_close_is_kept(forward: StartForward, kind: str, tmp_path: Path) -> None:
    with serving(CountThenAnswer, tmp_path / "server" if kind == "unix" else None) as where:
        listen = f"unix:{tmp_path / 'here'}" if kind == "unix" else "0"
        target = f"unix:{where}" if kind == "unix" else f"127.0.0.1:{where}"
        _, [here] = forward("-L", f"{listen}:{target}")
        with connect(here) as client:
            client.sendall(bytes(1_000_000))
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"1000000\n"


def test_half_close_of_the_server_is_kept(forward: StartForward) -> None:
    with serving(Greet) as port:
        _, [here] = forward("-L", f"0:127.0.0.1:{port}")
        with connect(here) as client:
            assert len(read_all(client)) == 120_000
            # The other way is still open.
            client.sendall(b"x" * 100_000)


@pytest.mark.parametrize("target", ["tcp", "unix"])
def test_remote_forward_brings_connections_to_the_host(forward: StartForward, target: str, tmp_path: Path) -> None:
    with serving(CountThenAnswer, tmp_path / "server" if target == "unix" else None) as where:
        _, [there] = forward("-R", f"0:{where}")
        for size in (0, 5, 300_000):
            with connect(there) as client:
                client.sendall(bytes(size))
                client.shutdown(socket.SHUT_WR)
                assert read_all(client) == b"%d\n" % size


def test_remote_forward_from_a_unix_socket(forward: StartForward, tmp_path: Path) -> None:
    with serving(Echo) as port:
        process, [there] = forward("-R", f"{tmp_path}/there:{port}")
        with connect(there) as client:
            client.sendall(b"hi")
            assert client.recv(10) == b"hi"
        assert Path(there).stat().st_mode & 0o777 == 0o600
        process.terminate()
        assert process.wait(DEADLINE_S) == 128 + 15
        wait_until(lambda: not Path(there).exists(), "the guest's socket is removed")


def test_bulk_both_ways_at_once_is_exact(forward: StartForward) -> None:
    data = os.urandom(1 << 20) * 24
    with serving(Echo) as port:
        _, [here] = forward("-L", f"0:127.0.0.1:{port}")
        with connect(here) as client:

            def send() -> None:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)

            sender = threading.Thread(target=send)
            sender.start()
            got = hashlib.sha256()
            while piece := client.recv(1 << 18):
                got.update(piece)
            sender.join()
    assert got.digest() == hashlib.sha256(data).digest()


def test_many_connections_at_once(forward: StartForward) -> None:
    with serving(Echo) as port:
        _, [here] = forward("-L", f"0:127.0.0.1:{port}")
        clients = [connect(here) for _ in range(100)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        for number, client in enumerate(clients):
            assert client.recv(10) == b"%d" % number
            client.close()


def test_stalled_connection_holds_up_no_other(forward: StartForward) -> None:
    with serving(Echo) as port:
        _, [here] = forward("-L", f"0:127.0.0.1:{port}")
        with connect(here) as stalled, connect(here) as other:
            stalled.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    stalled.send(bytes(1 << 16))
            other.sendall(b"alive")
            assert other.recv(10) == b"alive"


def test_refused_target_costs_one_connection_and_a_line(forward: StartForward) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        process, [here] = forward("-L", f"0:127.0.0.1:{port}")
        with contextlib.suppress(ConnectionResetError), connect(here) as client:
            assert client.recv(10) == b""
        line = read_line(process.stderr)
        assert line.endswith(f"cannot connect to tcp:127.0.0.1:{port}: Connection refused"), line
        closed.listen()
        with connect(here) as client:
            closed.accept()[0].close()
            assert client.recv(1) == b""


def test_reset_of_the_server_is_a_reset_for_the_client(forward: StartForward) -> None:
    with serving(Reset) as port:
        _, [here] = forward("-L", f"0:127.0.0.1:{port}")
        with connect(here) as client, pytest.raises(ConnectionResetError):
            client.sendall(b"x")
            while client.recv(10):
                pass
            # Over vsock a reset may come as an end; then what is sent next meets it.
            client.sendall(b"x")
            raise ConnectionResetError


def test_port_in_use_is_one_line_and_nothing_runs(vshd: Vshd) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("-L", "-R"):
            done = vshd.run(flag, f"{port}:localhost:1", "--", "echo", "ran")
            assert (done.returncode, done.stdout) == (1, b"")
            text = done.stderr.decode()
            assert f"cannot listen at tcp:127.0.0.1:{port}: Address already in use" in text
            assert len(text.splitlines()) == 1, text


def test_vsock_port_needs_a_machine(forward: StartForward) -> None:
    process, [here] = forward("-L", "0:80")
    with contextlib.suppress(ConnectionResetError), connect(here) as client:
        assert client.recv(1) == b""
    assert "has no vsock ports: it is a vshd alone" in read_line(process.stderr)


def test_forwards_live_as_long_as_the_command(vshd: Vshd) -> None:
    with serving(Echo) as port:
        script = "read line; echo got $line"
        with ended(
            vshd.start("-v", "-L", f"0:127.0.0.1:{port}", "--", "sh", "-c", script, stdin=subprocess.PIPE)
        ) as process:
            here = find_place(read_line(process.stderr).split(" at ")[1].split(" for ")[0])
            with connect(here) as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
                process.stdin.write(b"on\n")
                process.stdin.flush()
                assert process.stdout.read() == b"got on\n"
                assert process.wait(DEADLINE_S) == 0
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(here)


def test_killed_vsh_takes_its_forwards_along(vshd: Vshd) -> None:
    with serving(Echo) as port:
        with ended(vshd.start("-v", "-R", f"0:{port}", "--", "sleep", "1000")) as process:
            there = find_place(read_line(process.stderr).split(" at ")[1].split(" for ")[0])
            connect(there).close()
            process.kill()
        wait_until(lambda: not vshd.children(), "the sessions have ended")
    with pytest.raises(ConnectionRefusedError):
        connect(there)


def test_remote_listener_admits_only_those_with_the_token(forward: StartForward, tmp_path: Path) -> None:
    """A program of the guest that finds our end of a listening forward gets nothing from it."""
    with serving(Greet) as port:
        # Its own folder: other tests that run at the same time have such sockets as well.
        process, _ = forward("-R", f"0:{port}", env={**ENVIRONMENT, "TMPDIR": str(tmp_path)})
        [path] = tmp_path.glob("vsh-host-*")
        with connect(str(path)) as client:
            client.sendall(bytes(32))
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
        assert "it is not from the guest's vshd" in read_line(process.stderr)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_proxy_joins_stdio_to_a_place(vshd: Vshd, kind: str, tmp_path: Path) -> None:
    with serving(CountThenAnswer, tmp_path / "server" if kind == "unix" else None) as where:
        target = where if kind == "unix" else f"localhost:{where}"
        done = vshd.run("--proxy", target, input=bytes(500_000))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"500000\n", b"")


def test_proxy_over_a_socketpair_keeps_half_close(vshd: Vshd) -> None:
    with serving(CountThenAnswer) as port:
        ours, theirs = socket.socketpair()
        with (
            ours,
            ended(vshd.start("--proxy", f"localhost:{port}", stdin=theirs.fileno(), stdout=theirs.fileno())) as process,
        ):
            theirs.close()
            ours.sendall(b"four")
            ours.shutdown(socket.SHUT_WR)
            assert read_all(ours) == b"4\n"
            assert process.wait(DEADLINE_S) == 0


def test_proxy_over_pipes_ends_its_output_with_the_server(vshd: Vshd) -> None:
    """The reader of a pipe sees the end although vsh's input stays open."""
    with (
        serving(Greet) as port,
        ended(vshd.start("--proxy", f"localhost:{port}", stdin=subprocess.PIPE)) as process,
    ):
        data = b""
        while True:
            ready, _, _ = select.select([process.stdout], [], [], DEADLINE_S)
            assert ready, "no end of the output"
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            data += piece
        assert data.endswith(b"hello ")
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0


def test_proxy_passes_the_connection_itself(vshd: Vshd) -> None:
    with serving(Echo) as port:
        ours, theirs = socket.socketpair()
        with ours, ended(vshd.start("--proxy", f"localhost:{port}", "--fdpass", stdout=theirs.fileno())) as process:
            theirs.close()
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            assert process.wait(DEADLINE_S) == 0
            with socket.socket(fileno=fds[0]) as passed:
                passed.sendall(b"direct")
                assert passed.recv(10) == b"direct"


def test_proxy_to_nobody_says_so(vshd: Vshd) -> None:
    # A number: what `localhost` is depends on where there is IPv6.
    done = vshd.run("--proxy=127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr == b"vsh: cannot connect to tcp:127.0.0.1:1: Connection refused\n"


def test_server_that_speaks_legacy_mode_only_says_so(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--noextended")
    done = vshd.run("--proxy=localhost:1")
    assert done.returncode == 1
    assert b"a service needs extended mode" in done.stderr


def test_forward_runs_as_the_user(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--allow_user=root")
    done = vshd.run("--proxy=localhost:1", "--user=nobody")
    assert b"user nobody is not allowed to log in" in done.stderr


def test_usage(vshd: Vshd) -> None:
    for words, text in (
        (["-N"], b"-N needs a forward"),
        (["-N", "-L", "1:2", "--", "true"], b"-N runs no command"),
        (["-L", "nonsense"], b"bad forward 'nonsense'"),
        (["-L", "1:2:3:4:5"], b"bad forward"),
        (["--proxy=x:y"], b"'y' is no port"),
    ):
        done = vshd.run(*words)
        assert done.returncode == 64, done
        assert text in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-L", "nonsense", "--", "true"], "bad forward 'nonsense'"),
        (["-N", "-R", "1:2:3:4:5"], "bad forward '1:2:3:4:5'"),
        (["--proxy=x:y"], "bad forward 'x:y'"),
        (["-N"], "-N needs a forward"),
        (["--fdpass"], "--fdpass needs --proxy\nhint: write vsh --proxy=PLACE --fdpass\n"),
        (["--fdpass", "-L", "1:2"], "--fdpass needs --proxy\n"),
    ],
)
def test_usage_is_checked_before_a_machine_is_looked_for(tmp_path: Path, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vsh", "--vm_name=gone", *words],
        env={**ENVIRONMENT, "VMKIT_RUNTIME_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 64, done
    assert done.stderr.startswith(f"vsh: {said}"), done


def test_dead_unix_socket_is_replaced_and_a_live_one_is_not(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "here"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with ended(vshd.start("-v", "-N", "-L", f"{path}:localhost:1")) as process:
        read_line(process.stderr)
        done = vshd.run("-N", "-L", f"{path}:localhost:1", env=ENVIRONMENT)
        assert (done.returncode, b"the socket is in use by another program" in done.stderr) == (1, True)
        process.terminate()
        process.wait(DEADLINE_S)
    assert not path.exists()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("/dev/null")])
def test_other_file_where_a_forward_should_listen_stays(
    vshd: Vshd, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "precious"
    make(path)
    before = os.lstat(path)
    done = vshd.run("-N", "-L", f"{path}:localhost:1", env=ENVIRONMENT)
    assert done.returncode == 1
    assert f"cannot listen at unix:{path}: the path is a".encode() in done.stderr
    assert b"hint: choose another path" in done.stderr
    assert os.path.samestat(os.lstat(path), before)


def test_forward_that_ends_leaves_the_socket_of_another_program(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "here"
    with ended(vshd.start("-v", "-N", "-L", f"{path}:localhost:1")) as process, socket.socket(socket.AF_UNIX) as other:
        read_line(process.stderr)
        path.unlink()
        other.bind(str(path))
        process.terminate()
        process.wait(DEADLINE_S)
        assert path.is_socket()


def test_listener_of_the_guest_leaves_another_file(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.touch()
    done = vshd.run("-N", "-R", f"{path}:1", env=ENVIRONMENT)
    assert (done.returncode, b"the path is a regular file, not a socket" in done.stderr) == (1, True)
    assert path.is_file()


def test_listener_of_the_guest_replaces_a_dead_socket(forward: Any, tmp_path: Path) -> None:
    path = tmp_path / "there"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(Echo) as port:
        forward("-R", f"{path}:{port}")
        with connect(str(path)) as client:
            client.sendall(b"hi")
            assert client.recv(10) == b"hi"
