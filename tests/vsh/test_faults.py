"""Peers that die, stop or fall silent, at every stage: both sides notice, say so once, and leave nothing behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Program, StartVshd, Vshd, ended, read_line, wait_for_end, wait_until
from tests.vshd.joined import Joined
from vshd.wire import messages
from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.events import Data, Established, Event, RequestReceived
from vshd.wire.frames import encode_frame
from vshd.wire.messages import CreditMessage, HostMessage, SetupConnectionRequest
from vshd.wire.server import ServerConnection


def test_timeout_ends_the_command(vshd: Vshd, mode: list[str]) -> None:
    started = time.monotonic()
    done = vshd.run(*mode, "--timeout", "0.5", "--", "sleep", "87")
    assert (done.returncode, done.stdout) == (124, b"")
    assert b"vsh: the command did not end in time" in done.stderr
    assert time.monotonic() - started < 20
    wait_until(lambda: not vshd.children(), "the session has ended")


def test_timeout_that_is_not_over_changes_nothing(vshd: Vshd, mode: list[str]) -> None:
    assert vshd.run(*mode, "--timeout=60", "--", "sh", "-c", "exit 4").returncode == 4


def test_connect_timeout_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-m", "vsh", f"--unix={path}", "--connect_timeout=0.3", "--", "true"]
        done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert b"does not answer" in done.stderr


# SIGKILL of each side at every stage


STAGES = {
    "before the request": [],
    "after half a request": ["half"],
    "after the request": ["request"],
    "while it runs": ["request", "established"],
    "with input under way": ["request", "established", "input"],
    "with output under way": ["request", "established", "output"],
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_extended", [True, False], ids=["extended", "legacy"])
def test_client_that_dies_leaves_nothing(vshd: Vshd, stage: str, is_extended: bool) -> None:
    """A client's death is the end of its socket, at whatever byte."""
    client = ClientConnection(default_limits() if is_extended else None)
    client.send_setup(SetupConnectionRequest(target=b"/vm_shell", argv=[b"sh", b"-c", b"yes & cat"], nopty=True))
    setup = client.output.take()
    with vshd.connect() as connection:
        for step in STAGES[stage]:
            match step:
                case "half":
                    connection.sendall(setup[: len(setup) // 2])
                case "request":
                    connection.sendall(setup)
                case "established":
                    events: list[Event] = []
                    while not events:
                        events = client.receive_data(connection.recv(16))
                    assert isinstance(events[0], Established)
                case "input":
                    client.send_data(messages.STDIN, bytes(100_000))
                    connection.sendall(client.output.take()[:50_000])
                case _:
                    assert connection.recv(100)
    wait_until(lambda: not vshd.children(), "the session has ended")


@pytest.mark.parametrize("answer", ["nothing", "half a response", "a response", "some output", "half a frame"])
@pytest.mark.parametrize("is_extended", [True, False], ids=["extended", "legacy"])
def test_server_that_dies_is_one_line(tmp_path: Path, answer: str, is_extended: bool) -> None:
    joined = Joined(server=default_limits() if is_extended else None).establish()
    response = joined.to_client
    joined.server.send_data(messages.STDOUT, b"out\n")
    said = {
        "nothing": b"",
        "half a response": response[: len(response) // 2],
        "a response": response,
        "some output": response + joined.server.output.take(),
    }
    joined.server.send_data(messages.STDOUT, b"more output")
    said["half a frame"] = said["some output"] + joined.server.output.take()[:9]
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-m", "vsh", f"--unix={path}", "--", "true"]
        with ended(subprocess.Popen(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)) as client:
            listener.settimeout(DEADLINE_S)
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(said[answer])
            out, err = client.communicate(timeout=DEADLINE_S)
    if answer in ("nothing", "half a response"):
        assert (client.returncode, out) == (1, b"")
        assert b"closed the connection without an answer" in err
    else:
        assert client.returncode == 123
        assert err.startswith(b"vsh: lost the connection to ")
        assert err.count(b"\n") == 1
        assert out == {"a response": b"", "some output": b"out\n", "half a frame": b"out\n"}[answer]


# Silence


def test_server_that_reads_no_more_can_still_end_the_session(tmp_path: Path) -> None:
    """Bulk that was on its way to it is nowhere in the way of more, or of the exit status."""
    path = tmp_path / "deaf.sock"
    with socket.socket(socket.AF_UNIX) as listener, Path("/dev/zero").open("rb") as zeros:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-m", "vsh", f"--unix={path}", "--", "x"]
        with (
            ended(subprocess.Popen(["cat"], stdin=zeros, stdout=subprocess.PIPE)) as feeder,
            ended(Program(argv, env=ENVIRONMENT, stdin=feeder.stdout, stderr=subprocess.PIPE)) as client,
            listener.accept()[0] as peer,
        ):
            server = ServerConnection(default_limits())
            peer.settimeout(DEADLINE_S)
            while not any(isinstance(event, RequestReceived) for event in server.receive_data(peer.recv(1 << 16))):
                pass
            server.accept(1)
            received = 0
            while received < 3 << 20:
                peer.sendall(server.output.take())
                data = peer.recv(1 << 18)
                received += len(data)
                for event in server.receive_data(data):
                    if isinstance(event, Data):
                        server.consumed(messages.STDIN, len(event.data))
            peer.shutdown(socket.SHUT_RD)
            for _ in range(20):
                # As a frame of its own each time, so that the client comes to read its stdin in between.
                credit = CreditMessage(messages.STDIN, 1 << 18)
                peer.sendall(encode_frame(HostMessage(messages.CREDIT, credit).encode(), server.max_payload))
                time.sleep(0.01)
            for stream in (messages.STDOUT, messages.STDERR):
                server.send_end(stream)
            server.send_exit(7)
            peer.sendall(server.output.take())
            assert client.wait(DEADLINE_S) == 7
            assert client.stderr.read() == b""


def test_server_that_falls_silent_is_noticed(vshd: Vshd) -> None:
    with ended(vshd.start("--keepalive=0.6", "--", "sh", "-c", "echo up; sleep 86")) as client:
        read_line(client.stdout)
        (session,) = vshd.children()
        os.kill(session, signal.SIGSTOP)
        try:
            assert client.wait(DEADLINE_S) == 123
            assert b"it has fallen silent" in client.stderr.read()
        finally:
            os.kill(session, signal.SIGCONT)
    wait_until(lambda: not vshd.children(), "the session has ended")


def test_session_that_has_nothing_to_say_is_kept_alive(vshd: Vshd) -> None:
    done = vshd.run("--keepalive=0.6", "--", "sh", "-c", "sleep 2; exit 6")
    assert done.returncode == 6


def test_suspended_client_keeps_its_session(start_vshd: StartVshd) -> None:
    """TSTP announces itself; a server with little patience waits until the client is back."""
    vshd = start_vshd("--keepalive=1")
    # In a group of its own, as a shell's job is: the kernel never stops an orphaned group (setpgid(2), POSIX).
    start = vshd.start("--", "sh", "-c", "echo $$; read x; echo [$x]", stdin=subprocess.PIPE, process_group=0)
    with ended(start) as client:
        read_line(client.stdout)
        client.send_signal(signal.SIGTSTP)
        wait_until(lambda: os.waitpid(client.pid, os.WUNTRACED | os.WNOHANG)[0] == client.pid, "it stops")
        time.sleep(2.5)
        client.send_signal(signal.SIGCONT)
        client.stdin.write(b"back\n")
        client.stdin.flush()
        assert read_line(client.stdout) == "[back]"
        assert client.wait(DEADLINE_S) == 0


def test_stopped_client_is_given_up(start_vshd: StartVshd) -> None:
    """STOP announces nothing: the server's patience ends."""
    vshd = start_vshd("--keepalive=1")
    with ended(vshd.start("--", "sh", "-c", "echo $$; exec sleep 84")) as client:
        target = int(read_line(client.stdout))
        client.send_signal(signal.SIGSTOP)
        wait_for_end(target)
        client.send_signal(signal.SIGCONT)
        assert client.wait(DEADLINE_S) == 123
    wait_until(lambda: "the client has fallen silent" in vshd.log, "the log says why")


# Signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_user_signals_are_forwarded_in_extended_mode(vshd: Vshd, number: signal.Signals) -> None:
    name = signal.Signals(number).name[3:]
    script = f"trap 'echo got {name}; exit 8' {name}; echo ready; while :; do sleep 0.05; done"
    with ended(vshd.start("--", "sh", "-c", script)) as client:
        read_line(client.stdout)
        client.send_signal(number)
        assert read_line(client.stdout) == f"got {name}"
        assert client.wait(DEADLINE_S) == 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_are_forwarded_every_time(vshd: Vshd, mode: list[str], number: signal.Signals) -> None:
    name = signal.Signals(number).name[3:]
    script = f"n=0; trap 'n=$((n+1)); echo $n' {name}; echo ready; while [ $n -lt 3 ]; do sleep 0.05; done; exit 7"
    with ended(vshd.start(*mode, "--", "sh", "-c", script)) as client:
        assert read_line(client.stdout) == "ready"
        for count in range(1, 4):
            client.send_signal(number)
            assert read_line(client.stdout) == str(count)
        assert client.wait(DEADLINE_S) == 7


def test_signal_before_the_session_runs_ends_vsh(tmp_path: Path) -> None:
    path = tmp_path / "mute.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-m", "vsh", f"--unix={path}", "--", "true"]
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, -15)):
            with ended(Program(argv, env=ENVIRONMENT, stderr=subprocess.PIPE)) as client:
                listener.settimeout(DEADLINE_S)
                connection, _ = listener.accept()
                with connection:
                    assert select.select([connection], [], [], DEADLINE_S)[0]
                    client.send_signal(number)
                    assert client.wait(DEADLINE_S) == status
                    assert client.stderr.read() == b""


def test_own_words_come_after_the_end_of_the_targets_stderr(vshd: Vshd, mode: list[str]) -> None:
    with ended(vshd.start(*mode, "--", "sh", "-c", "exec 2>&-; echo up; exec sleep 82")) as client:
        read_line(client.stdout)
        for pid in vshd.children():
            os.kill(pid, signal.SIGKILL)
        assert client.wait(DEADLINE_S) == 123
        assert b"vsh: lost the connection" in client.stderr.read()
