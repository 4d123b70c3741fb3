"""Peers that a session cannot go on with: deadlocked, of another mind about exits, or unable to take the request."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Program, Vshd, ended
from vsh.reaction import PLEA_GRACE_S, PLEAS, SEND_GRACE_S, Reaction
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.events import Event, RequestReceived, Signalled
from vshd.wire.server import ServerConnection


@contextlib.contextmanager
def serving(
    folder: Path, *words: str | bytes, limits: messages.Extended | None = None, **options: Any
) -> Iterator[tuple[Program, socket.socket, ServerConnection]]:
    """A vsh, and the server's end of its connection with the session established; legacy without limits."""
    path = folder / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        argv = [sys.executable, "-m", "vsh", f"--unix={path}", *words]
        options.setdefault("stdin", subprocess.DEVNULL)
        process = Program(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        with ended(process) as client, listener.accept()[0] as peer:
            peer.settimeout(DEADLINE_S)
            server = ServerConnection(limits)
            await_event(peer, server, RequestReceived)
            server.accept(1)
            server.send_data(messages.STDOUT, b"up\n")
            peer.sendall(server.output.take())
            assert client.stdout.readline() == b"up\n"
            yield client, peer, server


def await_event(peer: socket.socket, server: ServerConnection, kind: type[Event]) -> None:
    while True:
        data = peer.recv(4096)
        assert data, "vsh has ended"
        if any(isinstance(event, kind) for event in server.receive_data(data)):
            return


def finish(client: Program) -> tuple[int, str]:
    _, err = client.communicate(timeout=DEADLINE_S)
    return client.returncode, err.decode()


def test_legacy_server_that_does_not_react_to_sigterms_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, "--", "x") as (client, peer, server):
        for _ in range(3):
            client.send_signal(signal.SIGTERM)
            # Signals of one kind that come at once are one.
            await_event(peer, server, Signalled)
        status, err = finish(client)
    assert status == 123
    assert "it did not react to 3 SIGTERMs\nhint: the command may still run in the guest\n" in err


def test_legacy_server_that_takes_no_signal_is_given_up(tmp_path: Path) -> None:
    """It reads nothing, and what is under way to it fills the transport."""
    with Path("/dev/zero").open("rb") as zeros, serving(tmp_path, "--", "x", stdin=zeros) as (client, _, _):
        client.send_signal(signal.SIGINT)
        status, err = finish(client)
    assert (status, "it has read nothing for 5 s, not even a signal" in err) == (123, True)


def test_timeout_tells_whether_the_server_took_what_was_sent(vshd: Vshd, tmp_path: Path) -> None:
    with (
        Path("/dev/zero").open("rb") as zeros,
        serving(tmp_path, "--timeout=1", "--", "x", stdin=zeros) as (client, _, _),
    ):
        status, err = finish(client)
    assert (status, "has not read all that was sent: the processes may still run" in err) == (124, True)
    done = vshd.run("--timeout=0.2", "--", "sleep", "81")
    assert b"hint: the connection is closed; the guest's vshd ends the processes\n" in done.stderr


@pytest.mark.parametrize(("code", "number"), [(256, 0), (512, 0), (-1, 0), (1 << 30, 0), (0, 65)])
def test_exit_that_no_process_can_have_is_a_fault(tmp_path: Path, code: int, number: int) -> None:
    """256 and 512 have the low byte of success."""
    limits = default_limits() if number else None
    with serving(tmp_path, "--", "x", limits=limits) as (client, peer, server):
        for stream in (messages.STDOUT, messages.STDERR):
            server.send_end(stream)
        server.send_exit(code, signal=number)
        peer.sendall(server.output.take())
        status, err = finish(client)
    assert status == 123
    what = f"signal {number}" if number else f"status {code}"
    assert f"reported the exit {what}, which no process can have" in err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([b"--", b"echo", b"caf\xe9"], "argument 1 is not: b'caf\\xe9'"),
        ([b"--", b"\xff"], "the command is not: b'\\xff'"),
        ([b"--env=A=\xe9", b"--", b"true"], "the variable A is not: b'A=\\xe9'"),
        ([b"--user=\xe9", b"--", b"true"], "the user is not: b'\\xe9'"),
        ([b"--cwd=/\xe9", b"--", b"true"], "the directory is not: b'/\\xe9'"),
        ([b"--", b"echo", "café".encode()], ""),
    ],
)
def test_word_that_a_legacy_server_cannot_take_is_the_cause(tmp_path: Path, words: list[bytes], what: str) -> None:
    """Its parser refuses the request, and it closes the connection."""
    path = tmp_path / "peer.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        argv = [os.fsencode(sys.executable), b"-m", b"vsh", os.fsencode(f"--unix={path}"), *words]
        with ended(subprocess.Popen(argv, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)) as client:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
            _, err = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 1
    assert b"closed the connection without an answer" in err
    hint = f"hint: ChromeOS's vshd takes UTF-8 alone, and {what}\n" if what else "such as a CID that it does not serve"
    assert hint in err.decode()


# When a peer counts as stuck.


def test_pleas_need_number_and_time() -> None:
    reaction = Reaction()
    for _ in range(PLEAS - 1):
        reaction.signalled(10.0, is_plea=True)
    assert not reaction.find_fault(1e6, is_sent=True)
    assert reaction.wait_s(10.0, is_sent=True) is None
    reaction.signalled(10.5, is_plea=True)
    assert reaction.wait_s(10.5, is_sent=True) == PLEA_GRACE_S - 0.5
    assert not reaction.find_fault(10.0 + PLEA_GRACE_S - 0.1, is_sent=True)
    assert reaction.find_fault(10.0 + PLEA_GRACE_S, is_sent=True)


def test_any_byte_is_a_reaction() -> None:
    reaction = Reaction()
    for _ in range(PLEAS):
        reaction.signalled(10.0, is_plea=True)
    reaction.heard()
    assert reaction.wait_s(11.0, is_sent=False) is None
    reaction.signalled(20.0, is_plea=True)
    assert not reaction.find_fault(1e6, is_sent=True)


def test_peer_that_takes_bytes_is_not_stuck() -> None:
    reaction = Reaction()
    reaction.signalled(10.0, is_plea=False)
    reaction.moved(14.0)
    assert not reaction.find_fault(10.0 + SEND_GRACE_S, is_sent=False)
    assert reaction.wait_s(15.0, is_sent=False) == SEND_GRACE_S - 1.0
    assert reaction.find_fault(14.0 + SEND_GRACE_S, is_sent=False)
    assert not reaction.find_fault(1e6, is_sent=True)
