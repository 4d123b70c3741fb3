"""What no starter, user or client of the daemon may bring about, however odd: each case was a fault once."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import (
    CHECKOUT,
    DEADLINE_S,
    DEFAULT_USER,
    ENVIRONMENT,
    START,
    Program,
    StartVshd,
    Vshd,
    ended,
    read_line,
    wait_until,
)
from tests.vshd.test_server import make_setup, read_events
from vshd.server import UNPROVEN_MAX
from vshd.wire import messages
from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.events import Event, Exited, Refused
from vshd.wire.frames import encode_frame
from vshd.wire.messages import GuestMessage, SetupConnectionRequest


def ask(vshd: Vshd, client: ClientConnection, setup: bytes) -> list[Event]:
    """The events of a session that gets `setup` and no input."""
    with vshd.connect() as connection:
        connection.sendall(setup)
        return read_events(connection, client)


def test_inherited_descriptors_stay_out_of_targets(start_vshd: StartVshd) -> None:
    """Whoever starts the daemon may have left files open: a target has its stdio alone."""
    reading, writing = os.pipe()
    vshd = start_vshd(pass_fds=[writing])
    os.close(writing)
    done = vshd.run("--", "sh", "-c", "ls /proc/$$/fd")
    os.close(reading)
    assert done.stdout.split() == [b"0", b"1", b"2"] or done.stdout.split() == [b"0", b"1", b"10", b"2"]


def test_name_that_no_user_can_have_is_answered(start_vshd: StartVshd) -> None:
    """Without switching there is no look-up that would refuse it, and no name but that of vshd's own user."""
    vshd = start_vshd("--noallow_to_switch_user")
    for name in (b"a\0b", b"nobody", b"\xff\n"):
        request = SetupConnectionRequest(target=b"box", user=name, argv=[b"sh", b"-c", b"echo $USER"], nopty=True)
        client = ClientConnection(default_limits())
        client.send_setup(request)
        events = ask(vshd, client, client.output.take())
        assert isinstance(events[-1], Exited)
    done = vshd.run("--", "sh", "-c", "echo $USER; id -un")
    assert len(set(done.stdout.split())) == 1


@pytest.mark.root
def test_allowed_users_are_those_who_run_also_without_switching(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--noallow_to_switch_user", "--allow_user=nobody", "--default_user=nobody")
    done = vshd.run("--", "true")
    assert done.returncode == 1
    assert b"user root is not allowed to log in" in done.stderr


@pytest.mark.parametrize(("flag", "kind"), [("--extended", messages.LIMIT), ("--noextended", None)])
def test_refusal_before_the_request_is_read_is_typed(start_vshd: StartVshd, flag: str, kind: int | None) -> None:
    """The server does not read what a client over the limit asks for, and answers all the same."""
    vshd = start_vshd("--max_sessions=0", flag)
    client, setup = make_setup(b"true", limits=default_limits())
    (event,) = ask(vshd, client, setup)
    assert isinstance(event, Refused)
    assert event.description == "too many sessions"
    assert (event.failure.kind if event.failure else None) == kind


def test_refusal_of_a_long_request_is_not_taken_for_a_legacy_servers(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--max_sessions=0")
    done = vshd.run("--", "echo", "x" * 5000)
    assert (done.returncode, done.stderr) == (1, b"vsh: Server was unable to set up connection: too many sessions\n")


def test_limit_that_cannot_be_set_is_told(start_vshd: StartVshd) -> None:
    vshd = start_vshd(f"--max_processes={2**32 - 1}")
    unlimited = subprocess.run(["bash", "-c", "ulimit -Hu"], capture_output=True, check=True).stdout == b"unlimited\n"
    done = vshd.run("--", "true")
    if unlimited:
        assert (done.returncode, done.stderr) == (0, b"")
    else:
        assert done.returncode == 1
        assert b"could not set the session's limits" in done.stderr


def test_request_of_a_million_words_is_refused_in_bounded_memory(vshd: Vshd) -> None:
    """Every word becomes an object many times its size."""
    size = 8 << 20
    chunk = GuestMessage(messages.REQUEST_CHUNK, b"\x2a\x00" * (size // 2)).encode()
    client = ClientConnection(default_limits())
    client.send_setup(SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"x" * 5000], nopty=True))
    setup = client.output.take()
    assert client.limits
    client.limits.request_size = size
    stub = SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"x"], nopty=True, extended=client.limits)
    del chunk, setup
    with vshd.connect() as connection:
        connection.sendall(encode_frame(stub.encode(), 4096))
        connection.recv(1 << 16)
        (session,) = vshd.children()
        limit = default_limits().max_data
        for start in range(0, size, limit):
            piece = GuestMessage(messages.REQUEST_CHUNK, b"\x2a\x00" * (min(limit, size - start) // 2))
            connection.sendall(encode_frame(piece.encode(), limit + 96))
        peak_kib = 0
        while not select.select([connection], [], [], 0.02)[0]:
            peak_kib = max(peak_kib, _find_peak_kib(session))
        said = connection.recv(1 << 16)
    assert b"more than 1048576 fields" in said
    assert peak_kib < 128 << 10


def _find_peak_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in text else 0


def test_two_sockets_of_systemd_are_one_too_many() -> None:
    script = 'import os; os.environ["LISTEN_PID"] = str(os.getpid()); ' + START.format(str(CHECKOUT))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, "--log_stderr"],
        env={**ENVIRONMENT, "LISTEN_FDS": "2"},
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert b"systemd passed 2 sockets" in done.stderr


# A session whose client's side of the socket is full before it begins; says how much of that there is.
FULL = """
import os, sys
sys.path.insert(0, {checkout!r})
from vshd.flags import Options
from vshd.log import Log
from vshd.session.session import Session
from vshd.signals import SIGCHLD, SIGTERM, Wakeup
fd = int(sys.argv[1])
os.set_blocking(fd, False)
size = 0
try:
    while True:
        size += os.write(fd, bytes(4096))
except BlockingIOError:
    print(size, flush=True)
log = Log()
log.open(use_kmsg=False, use_stderr=True)
options = Options()
options.default_user = {user!r}
session = Session(fd, "test", options, log, Wakeup((SIGCHLD, SIGTERM)))
print(len(os.listdir("/proc/self/fd")), flush=True)
session.run()
"""


@contextlib.contextmanager
def stalled_session(script: str) -> Iterator[tuple[Program, socket.socket, ClientConnection, int]]:
    """A session's process, our end of its socket, and how many bytes stand before its first word."""
    client, setup = make_setup(b"sh", b"-c", script.encode(), limits=default_limits())
    ours, theirs = socket.socketpair()
    argv = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        FULL.format(checkout=str(CHECKOUT), user=DEFAULT_USER),
        str(theirs.fileno()),
    ]
    start = Program(argv, env=ENVIRONMENT, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with ours, ended(start) as session:
        theirs.close()
        ours.settimeout(DEADLINE_S)
        size = int(read_line(session.stdout))
        ours.sendall(setup)
        yield session, ours, client, size


def test_client_that_is_suspended_at_the_end_still_gets_the_exit(tmp_path: Path) -> None:
    """Longer than the patience that the session's last words once had."""
    with stalled_session(f"echo hi; >{tmp_path}/ran; exit 6") as (session, connection, client, filler):
        wait_until((tmp_path / "ran").exists, "the target has run")
        time.sleep(10.5)
        assert len(connection.recv(filler, socket.MSG_WAITALL)) == filler
        end = read_events(connection, client)[-1]
        assert isinstance(end, Exited)
        assert end.code == 6
        assert session.wait(DEADLINE_S) == 0


def test_client_that_leaves_before_it_has_all_does_not_end_what_lives_on(tmp_path: Path) -> None:
    """The target has ended; what it left in the background, with other stdio, is nobody's to end."""
    script = f"sleep 8 >/dev/null 2>&1 </dev/null & echo $! >{tmp_path}/pid"
    with stalled_session(script) as (session, connection, _, _):
        idle = int(read_line(session.stdout))
        wait_until(lambda: _has_ended_child(session.pid), "the target has ended")
        wait_until(lambda: len(os.listdir(f"/proc/{session.pid}/fd")) < idle, "the target's output has ended")
        connection.close()
        assert session.wait(DEADLINE_S) == 0
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
        assert b"exit 0, not all of it sent" in session.stderr.read()


def _has_ended_child(pid: int) -> bool:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    return states == ["Z"]


def _is_killed(pid: int) -> bool:
    """Whether a process has ended, or has SIGKILL to take (proc(5), /proc/PID/status)."""
    try:
        lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return lines["State"][0] in "ZX" or bool(int(lines["ShdPnd"], 16) >> (signal.SIGKILL - 1) & 1)


def test_silent_clients_are_few_at_a_time_and_make_room(start_vshd: StartVshd) -> None:
    """Each costs a process: together they must not fill a small guest's memory, nor keep other clients out."""
    vshd = start_vshd("--handshake_timeout=6")
    with contextlib.ExitStack() as stack:
        for _ in range(UNPROVEN_MAX + 20):
            stack.enter_context(vshd.connect())
        assert vshd.run("--", "echo", "in").stdout == b"in\n"
        # On a busy host, some of those that were dropped have still to end.
        assert sum(not _is_killed(pid) for pid in vshd.children()) <= UNPROVEN_MAX + 2
    assert "dropped: it is silent, and others wait" in vshd.log
