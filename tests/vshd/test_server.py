"""The daemon as a citizen: whom it serves, as whom, within which limits, and what it leaves behind."""

import contextlib
import os
import pwd
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.descriptors import read_descriptors
from tests.vsh.live import (
    CHECKOUT,
    DEADLINE_S,
    DEFAULT_USER,
    ENVIRONMENT,
    OWN_USER,
    START,
    StartVshd,
    Vshd,
    ended,
    is_alive,
    read_line,
    wait_for_end,
    wait_until,
)
from vshd import oom
from vshd.flags import FlagError
from vshd.listener import parse_allowed_cids
from vshd.wire import messages, state
from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.events import Data, EndOfStream, Established, Event, Exited, Failed
from vshd.wire.frames import encode_frame
from vshd.wire.messages import SetupConnectionRequest


def make_setup(*argv: bytes, limits: messages.Extended | None = None, **fields: Any) -> tuple[ClientConnection, bytes]:
    """The bytes of a setup, and the connection that expects the answer."""
    client = ClientConnection(limits)
    request = SetupConnectionRequest(target=messages.VM_SHELL, argv=list(argv), nopty=True, **fields)
    client.send_setup(request)
    return client, client.output.take()


def read_events(connection: socket.socket, client: ClientConnection) -> list[Event]:
    """All events until the session's end."""
    events = []
    while not client.is_finished:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        events += client.receive_data(data) if data else client.receive_end()
    return events


# Whom it serves


def test_first_line_of_a_hybrid_vsock_is_answered(vshd: Vshd) -> None:
    for parts in ([b"CONNECT 9001\n"], [b"C", b"ONN", b"ECT 90", b"01", b"\n"]):
        client, setup = make_setup(b"true")
        with vshd.connect() as connection:
            for part in parts:
                connection.sendall(part)
            assert connection.recv(100) == b"OK 9001\n"
            connection.sendall(setup)
            assert isinstance(read_events(connection, client)[-1], Exited)


def test_first_line_and_setup_in_one_packet(vshd: Vshd) -> None:
    client, setup = make_setup(b"true")
    with vshd.connect() as connection:
        connection.sendall(b"CONNECT 9001\n" + setup)
        assert connection.recv(8) == b"OK 9001\n"
        assert isinstance(read_events(connection, client)[-1], Exited)


@pytest.mark.parametrize("line", [b"CONNECT x\n", b"CONNECT " + b"1" * 50 + b"\n", b"CONNECTION\n"])
def test_nonsense_line_is_hung_up_on(vshd: Vshd, line: bytes) -> None:
    with vshd.connect() as connection:
        connection.sendall(line + bytes(100))
        try:
            while connection.recv(100):
                pass
        except ConnectionResetError:
            pass


def test_users_may_be_restricted(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--allow_user=nobody")
    done = vshd.run("--user=root", "--", "true")
    assert done.returncode == 1
    assert b"user root is not allowed" in done.stderr


def test_switching_may_be_denied(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--noallow_to_switch_user")
    done = vshd.run("--user=nobody", "--", "true")
    assert done.returncode == 1
    assert f"only {DEFAULT_USER} is allowed login on the VM shell".encode() in done.stderr
    done = vshd.run("--", "sh", "-c", "echo $HOME $SHELL")
    assert done.stdout == b"/ /bin/sh\n"


def test_unknown_user_is_refused_in_upstreams_words(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--user=nobody-of-this-name", "--", "true")
    assert done.returncode == 1
    assert b"Server was unable to set up connection: could not find user: nobody-of-this-name" in done.stderr
    # Its advice is about ChromeOS: a client that knows the failure's kind leaves it out.
    assert (b"please use `vsh termina penguin`" in done.stderr) == bool(mode)


@pytest.mark.parametrize("size", [1900, 3900])
def test_refusal_that_quotes_long_words_still_fits_its_frame(vshd: Vshd, mode: list[str], size: int) -> None:
    for flags in ([f"--user={'x' * size}"], [f"--cwd=/{'x' * size}"]):
        done = vshd.run(*mode, *flags, "--", "sh", "-c", "exit 5")
        assert (done.returncode, b"xxxxxxxx" in done.stderr) == (
            5 if mode and flags[0].startswith("--cwd") else 1,
            True,
        )


# As whom


@pytest.mark.root
def test_session_runs_as_the_user(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--user=nobody", "--", "sh", "-c", "id -u; id -G; echo $USER $LOGNAME $HOME; umask")
    expected = subprocess.run(["id", "-G", "nobody"], capture_output=True, check=True).stdout
    home = b"/nonexistent" if b"nonexistent" in Path("/etc/passwd").read_bytes() else b"/"
    assert done.stdout == b"65534\n" + expected + b"nobody nobody " + home + b"\n0022\n"


@pytest.mark.root
def test_supplementary_groups_are_the_users(vshd: Vshd) -> None:
    mine = vshd.run("--user=root", "--", "id", "-G").stdout
    assert mine == subprocess.run(["id", "-G", "root"], capture_output=True, check=True).stdout


@pytest.mark.root
def test_no_code_of_roots_runs_after_the_switch(vshd: Vshd) -> None:
    with ended(vshd.start("--user=nobody", "--", "sh", "-c", "echo ready; exec sleep 93")) as client:
        read_line(client.stdout)
        (session,) = vshd.children()
        status = Path(f"/proc/{session}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534\n" in status
        assert "Gid:\t65534\t65534\t65534\t65534\n" in status
        client.kill()
    wait_until(lambda: not vshd.children(), "the session has ended")


@pytest.mark.root
def test_terminal_belongs_to_the_user(vshd: Vshd) -> None:
    done = vshd.run("-t", "--user=nobody", "--", "sh", "-c", "stat -c %u $(tty); echo hi >/dev/tty")
    assert done.stdout == b"65534\r\nhi\r\n"


def test_environment_is_complete(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--", "A=1", "env")
    lines = dict(line.split(b"=", 1) for line in done.stdout.splitlines())
    assert {b"A", b"HOME", b"LOGNAME", b"PATH", b"SHELL", b"TERM", b"USER"} <= set(lines)
    assert lines[b"TERM"] == b"xterm"
    assert b"NOTIFY_SOCKET" not in lines


def test_path_of_the_request_finds_the_program(vshd: Vshd, tmp_path: Path) -> None:
    tool = tmp_path / "a-tool-of-mine"
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)
    assert vshd.run("--", f"PATH={tmp_path}:/bin", "a-tool-of-mine").stdout == b"found\n"
    assert vshd.run("--", "PATH=/nonexistent", "a-tool-of-mine").returncode == 127


def test_target_starts_clean(vshd: Vshd, mode: list[str]) -> None:
    """Three descriptors, no signal ignored or blocked, a session and a group of its own."""
    script = "ls /proc/self/fd; grep -E 'Sig(Ign|Blk)' /proc/self/status; echo $(ps -o pid=,pgid=,sid= -p $$)"
    lines = vshd.run(*mode, "--", "sh", "-c", script).stdout.decode().splitlines()
    assert lines[:4] == ["0", "1", "2", "3"]  # 3 is ls's own
    # 32 and 33 are glibc's own; its posix_spawn() ignores them in every child.
    assert [int(line.split()[1], 16) & ~0x180000000 for line in lines[4:6]] == [0, 0]
    pid, group, session = lines[6].split()
    assert pid == group == session


def test_directory_of_another_process(vshd: Vshd) -> None:
    done = vshd.run(f"--cwd={os.getpid()}", "--", "pwd")
    assert done.stdout.decode().strip() == str(Path.cwd())
    assert vshd.run("--cwd=4000000", "--", "pwd").returncode == 1


def test_bad_directory_is_a_notice_for_a_legacy_client(vshd: Vshd) -> None:
    done = vshd.run("--noextended", "--cwd=/no/such", "--", "echo", "still")
    assert (done.returncode, done.stdout) == (0, b"still\n")
    assert done.stderr == b"vshd: cannot change to directory /no/such: No such file or directory\n"


# Within which limits


def test_sessions_are_limited(start_vshd: StartVshd, mode: list[str]) -> None:
    vshd = start_vshd("--max_sessions=2")
    first, second = (vshd.start(*mode, "--", "sh", "-c", "echo in; cat", stdin=subprocess.PIPE) for _ in range(2))
    with ended(first), ended(second):
        read_line(first.stdout)
        read_line(second.stdout)
        done = vshd.run(*mode, "--", "true")
        assert done.returncode == 1
        assert b"too many sessions" in done.stderr
        first.stdin.close()
        assert first.wait(DEADLINE_S) == 0
        wait_until(lambda: vshd.run(*mode, "--", "true").returncode == 0, "there is room again")


@pytest.mark.root
def test_processes_and_memory_are_limited(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--max_processes=77", "--max_memory=512")
    done = vshd.run("--user=nobody", "--", "cat", "/proc/self/limits")
    assert b"Max processes             77" in done.stdout
    assert str(512 << 20).encode() in done.stdout


@pytest.mark.root
def test_users_have_as_many_processes_as_memory_has_mib_and_root_has_more(vshd: Vshd) -> None:
    memory_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    expected = memory_mib if hard == resource.RLIM_INFINITY else min(memory_mib, hard)
    read_limit = ("--", "sh", "-c", "grep 'Max processes' /proc/self/limits")
    assert vshd.run("--user=nobody", *read_limit).stdout.split()[2:4] == [b"%d" % expected] * 2
    own = Path("/proc/self/limits").read_text().partition("Max processes")[2].split()[:2]
    assert vshd.run(*read_limit).stdout.decode().split()[2:4] == own


@pytest.mark.root
def test_limit_of_processes_can_be_taken_away(start_vshd: StartVshd) -> None:
    own = Path("/proc/self/limits").read_text().partition("Max processes")[2].split()[:2]
    vshd = start_vshd("--max_processes=0")
    done = vshd.run("--user=nobody", "--", "sh", "-c", "grep 'Max processes' /proc/self/limits")
    assert done.stdout.decode().split()[2:4] == own


@pytest.mark.root
def test_user_at_the_limit_is_refused_and_root_is_not(start_vshd: StartVshd) -> None:
    """nobody may have processes of its own here: the limit is one that is reached at once."""
    vshd = start_vshd("--max_processes=1")
    done = vshd.run("--user=nobody", "--", "sh", "-c", "sleep 1 & wait")
    assert done.returncode != 0
    assert b"esource temporarily unavailable" in done.stderr or b"fork" in done.stderr
    assert vshd.run("--", "echo", "root").stdout == b"root\n"


def test_score_for_the_oom_killer_is_taken_back_for_sessions(vshd: Vshd) -> None:
    """Where the kernel lets vshd change it; where not, nothing changes. (In a guest: test_vshd_life.py)."""
    own = Path("/proc/self/oom_score_adj").read_text()
    assert Path(f"/proc/{vshd.pid}/oom_score_adj").read_text() in (own, f"{oom.NEVER}\n")
    assert vshd.run("--", "cat", "/proc/self/oom_score_adj").stdout.decode() == own


def test_two_hundred_sessions_at_once(vshd: Vshd) -> None:
    connections = []
    try:
        for _ in range(200):
            client, setup = make_setup(b"cat")
            connection = vshd.connect()
            connection.sendall(setup)
            connections.append((connection, client))
        for connection, client in connections:
            events: list[Event] = []
            while not events:
                events = client.receive_data(connection.recv(4096))
            assert isinstance(events[0], Established)
        for connection, client in connections:
            client.send_data(messages.STDIN, b"x" * 1000)
            client.send_end(messages.STDIN)
            connection.sendall(client.output.take())
        for connection, client in connections:
            assert isinstance(read_events(connection, client)[-1], Exited)
    finally:
        for connection, _ in connections:
            connection.close()
    wait_until(lambda: not vshd.children(), "all sessions have ended")


def test_flood_of_connections_that_say_nothing(vshd: Vshd) -> None:
    for _ in range(300):
        vshd.connect().close()
    assert vshd.run("--", "echo", "still").stdout == b"still\n"
    wait_until(lambda: not vshd.children(), "all sessions have ended")


def test_many_sessions_leave_nothing_in_the_daemon(vshd: Vshd) -> None:
    def measure() -> tuple[int, int]:
        wait_until(lambda: not vshd.children(), "all sessions have ended")
        status = Path(f"/proc/{vshd.pid}/status").read_text()
        return len(os.listdir(f"/proc/{vshd.pid}/fd")), int(status.partition("VmRSS:")[2].split()[0])

    def run_one() -> None:
        client, setup = make_setup(b"true")
        with vshd.connect() as connection:
            connection.sendall(setup)
            read_events(connection, client)

    for _ in range(20):
        run_one()
    files, size = measure()
    for _ in range(200):
        run_one()
    files_after, size_after = measure()
    assert files_after == files
    assert size_after <= size * 1.05


# Faults


def test_client_that_dies_at_every_byte(vshd: Vshd) -> None:
    _, setup = make_setup(b"cat", limits=default_limits())
    said = setup + encode_frame(bytes.fromhex("0a070801120368690a"), 4096) + bytes.fromhex("040000000a020801")
    for end in range(0, len(said), 3):
        with vshd.connect() as connection:
            connection.sendall(said[:end])
    wait_until(lambda: not vshd.children(), "all sessions have ended")
    assert vshd.run("--", "echo", "still").stdout == b"still\n"


def test_session_killed_with_kill_ends_its_target(vshd: Vshd, mode: list[str]) -> None:
    with ended(vshd.start(*mode, "--", "sh", "-c", "echo $$; exec sleep 92")) as client:
        target = int(read_line(client.stdout))
        for pid in vshd.children():
            os.kill(pid, signal.SIGKILL)
        assert client.wait(DEADLINE_S) == 123
        assert b"lost the connection" in client.stderr.read()
        wait_for_end(target)
    assert "ended with -9" in vshd.log


def test_target_that_ignores_every_polite_signal_is_killed(vshd: Vshd) -> None:
    with ended(vshd.start("--", "sh", "-c", "trap '' HUP TERM INT; echo $$; while :; do sleep 1; done")) as client:
        target = int(read_line(client.stdout))
        client.kill()
        wait_for_end(target)


def test_stopped_target_is_ended_with_its_client(vshd: Vshd) -> None:
    with ended(vshd.start("--", "sh", "-c", "echo $$; kill -STOP $$; sleep 91")) as client:
        target = int(read_line(client.stdout))
        client.kill()
        wait_for_end(target)


def test_daemon_that_left_the_session_lives_on(vshd: Vshd, tmp_path: Path) -> None:
    """What made itself independent on purpose is no part of the session any more."""
    script = f"setsid sh -c 'echo $$ >{tmp_path}/pid; exec sleep 90' >&- 2>&- <&- & sleep 0.3; echo started; cat"
    with ended(vshd.start("--", "sh", "-c", script, stdin=subprocess.PIPE)) as client:
        read_line(client.stdout)
        client.kill()
        client.wait()
    wait_until(lambda: not vshd.children(), "the session has ended")
    daemon = int((tmp_path / "pid").read_text())
    assert is_alive(daemon)
    os.kill(daemon, signal.SIGKILL)


def test_grandchild_with_the_pipe_delays_the_exit(vshd: Vshd, mode: list[str]) -> None:
    """As upstream and ssh: output is complete before the exit is told."""
    done = vshd.run(*mode, "--", "sh", "-c", "(sleep 0.3; echo late) & exit 6")
    assert (done.returncode, done.stdout) == (6, b"late\n")


def test_unexpected_words_end_the_session_with_a_reason(vshd: Vshd) -> None:
    client, setup = make_setup(b"sleep", b"89", limits=default_limits())
    with vshd.connect() as connection:
        connection.sendall(setup)
        events: list[Event] = []
        while not events:
            events = client.receive_data(connection.recv(4096))
        connection.sendall(b"\xff\xff\xff\xff")
        (failed,) = read_events(connection, client)
        assert isinstance(failed, Failed)
        assert failed.failure
        assert failed.failure.kind == messages.PROTOCOL
        assert "exceeds max message size" in failed.description


# What it leaves behind


def test_shutdown_tells_clients_and_ends_targets(start_vshd: StartVshd, mode: list[str]) -> None:
    vshd = start_vshd()
    with ended(vshd.start(*mode, "--", "sh", "-c", "echo $$; exec sleep 88")) as client:
        target = int(read_line(client.stdout))
        assert vshd.stop() == 0
        assert client.wait(DEADLINE_S) == 123
        assert b"vshd is shutting down" in client.stderr.read()
        wait_for_end(target)
    assert not vshd.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_sessions_outlive_the_daemon(start_vshd: StartVshd, mode: list[str], number: int) -> None:
    vshd = start_vshd("--spare_time=60", ends_sessions=False)
    vshd.run("--", "true")
    wait_until(lambda: len(vshd.children()) == 1, "a spare waits")
    with ended(vshd.start(*mode, "--", "sh", "-c", "echo $PPID; cat; exit 7", stdin=subprocess.PIPE)) as client:
        # Numbers of processes begin again from below some day, so the order of two means nothing.
        session = int(read_line(client.stdout))
        wait_until(lambda: len(vshd.children()) == 2, "another spare waits")
        (spare,) = set(vshd.children()) - {session}
        vshd.process.send_signal(number)
        assert vshd.process.wait(DEADLINE_S) == (-number if number == signal.SIGKILL else 0)
        wait_for_end(spare)
        assert is_alive(session)
        client.stdin.write(b"still\n")
        client.stdin.close()
        assert client.stdout.read() == b"still\n"
        assert client.wait(DEADLINE_S) == 7
        wait_for_end(session)
    vshd.process.returncode = 0


def test_next_daemon_serves_beside_the_sessions_of_the_last(tmp_path: Path) -> None:
    first = Vshd(tmp_path, ends_sessions=False)
    with ended(first.start("-t", "--", "sh", "-c", "echo in; read x; echo got $x", stdin=subprocess.PIPE)) as client:
        read_line(client.stdout)
        assert first.stop() == 0
        assert "sessions that go on: 1" in first.log
        (tmp_path / "notify.sock").unlink()
        second = Vshd(tmp_path, ends_sessions=False)
        assert second.run("--", "echo", "new").stdout == b"new\n"
        assert second.stop() == 0
        client.stdin.write(b"it\n")
        client.stdin.flush()
        assert b"got it" in client.stdout.read()


def test_handshake_that_is_under_way_outlives_the_daemon(start_vshd: StartVshd) -> None:
    vshd = start_vshd(ends_sessions=False)
    client, setup = make_setup(b"true")
    with vshd.connect() as connection:
        connection.sendall(setup[:5])
        wait_until(vshd.children, "the session has its process")
        assert vshd.stop() == 0
        connection.sendall(setup[5:])
        assert isinstance(read_events(connection, client)[-1], Exited)


def test_dead_socket_is_replaced_and_a_live_one_is_not(start_vshd: StartVshd, tmp_path: Path) -> None:
    vshd = start_vshd()
    second = subprocess.run(
        [sys.executable, "-m", "vshd", f"--listen=unix:{vshd.path}", "--log_stderr"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert second.returncode == 1
    assert b"the socket is in use by another program" in second.stderr
    assert vshd.run("--", "true").returncode == 0


def test_other_file_where_the_daemon_should_listen_stays(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    done = subprocess.run(
        [sys.executable, "-m", "vshd", f"--listen=unix:{path}", "--log_stderr"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert f"Failed to listen at {path}: the path is a regular file, not a socket".encode() in done.stderr
    assert path.read_text() == "precious"


def test_daemon_that_ends_leaves_the_socket_of_another_program(start_vshd: Any) -> None:
    vshd = start_vshd()
    vshd.path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(vshd.path))
        assert vshd.stop() == 0
        assert vshd.path.is_socket()


def test_every_session_leaves_a_line(start_vshd: StartVshd) -> None:
    vshd = start_vshd()
    vshd.run("--", "sh", "-c", "exit 7")
    vshd.run("--", "sh", "-c", "kill -9 $$")
    vshd.run("--", "no-such-command")
    vshd.run("--", "echo", "a\nvshd: forged line\x1b[31m")
    wait_until(lambda: vshd.log.count("after") == 3, "all lines are written")
    name = pwd.getpwuid(os.geteuid()).pw_name
    assert re.search(rf"unix user {name}: exit 7 after .*: sh -c exit 7\n", vshd.log)
    assert re.search(r": signal 9 after .*: sh -c kill -9 \$\$\n", vshd.log)
    assert re.search(r": refused, since .*: no-such-command: no-such-command: command not found\n", vshd.log)
    assert "\nvshd: forged" not in vshd.log
    assert "\x1b" not in vshd.log


def start_activated(listener: socket.socket) -> subprocess.Popen[bytes]:
    """A vshd with LISTEN_FDS (sd_listen_fds(3)): a socket that was bound elsewhere, in a process whose pid it names."""
    script = 'import os; os.environ["LISTEN_PID"] = str(os.getpid()); ' + START.format(str(CHECKOUT))
    return subprocess.Popen(
        [
            *("bash", "-c", f'exec 3<&{listener.fileno()}; exec "$@"', "bash"),
            *(sys.executable, "-I", "-S", "-c", script, "--log_stderr", *OWN_USER),
        ],
        env={**ENVIRONMENT, "LISTEN_FDS": "1"},
        pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
    )


def test_socket_of_systemd_is_taken(tmp_path: Path) -> None:
    """A restart loses neither a session nor a client that connects in between."""
    path = tmp_path / "passed.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connection:
        listener.bind(str(path))
        listener.listen()
        client, setup = make_setup(b"sh", b"-c", b"read x")
        connection.settimeout(DEADLINE_S)
        connection.connect(str(path))
        with ended(start_activated(listener)) as daemon:
            connection.sendall(setup)
            while client.state == state.AWAITING_RESPONSE:
                client.receive_data(connection.recv(4096))
            daemon.terminate()
            assert daemon.wait(DEADLINE_S) == 0
        second, setup = make_setup(b"true")
        with socket.socket(socket.AF_UNIX) as early:
            early.settimeout(DEADLINE_S)
            early.connect(str(path))
            early.sendall(setup)
            with ended(start_activated(listener)) as daemon:
                assert isinstance(read_events(early, second)[-1], Exited)
                daemon.terminate()
                assert daemon.wait(DEADLINE_S) == 0
        client.send_data(messages.STDIN, b"\n")
        connection.sendall(client.output.take())
        assert isinstance(read_events(connection, client)[-1], Exited)


def test_vsock_is_denied_outside_machines() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vshd", "--log_stderr"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count(b"AF_VSOCK is denied by VSH_AF_VSOCK=deny") == 1


def test_peer_is_checked_by_cid() -> None:
    """The rule itself; the address a kernel reports is tested where there is a kernel with vsock."""
    assert parse_allowed_cids([]) == frozenset({2})
    assert parse_allowed_cids(["3", "7"]) == frozenset({2, 3, 7})
    assert parse_allowed_cids(["any"]) is None
    for word in ("", "x", "-1", str(2**32)):
        with pytest.raises(FlagError):
            parse_allowed_cids([word])


def test_window_size_of_a_message_is_applied(vshd: Vshd) -> None:
    assert struct.calcsize("HHHH") == 8
    done = vshd.run("-t", "--", "stty", "size")
    assert done.stdout == b"24 80\r\n"


@pytest.mark.parametrize(
    ("rows", "cols", "shown"), [(0, 0, b"0 0"), (7, 0, b"7 0"), (65536 + 9, -1, b"9 65535"), (33, 44, b"33 44")]
)
def test_window_size_of_a_later_message_is_taken_as_it_is(vshd: Vshd, rows: int, cols: int, shown: bytes) -> None:
    """As upstream's server does: 0 too, and 16 bits of what a terminal cannot have."""
    client = ClientConnection(None)
    argv = [b"sh", b"-c", b"read x; stty size"]
    client.send_setup(SetupConnectionRequest(target=messages.VM_SHELL, argv=argv, window_rows=24, window_cols=80))
    with vshd.connect() as connection:
        connection.sendall(client.output.take())
        while client.state == state.AWAITING_RESPONSE:
            client.receive_data(connection.recv(1 << 16))
        client.send_resize(rows, cols)
        client.send_data(messages.STDIN, b"\n")
        connection.sendall(client.output.take())
        said = b"".join(bytes(event.data) for event in read_events(connection, client) if isinstance(event, Data))
    assert said.split(b"\r\n")[-2] == shown


@pytest.mark.parametrize("first", [b"GET / HTTP/1.0\r\n\r\n", b"\2\0\0\0\x0a\x7f"], ids=["http", "nonsense"])
def test_first_message_that_is_no_request_is_hung_up_on(vshd: Vshd, first: bytes) -> None:
    with vshd.connect() as connection:
        connection.sendall(first)
        assert connection.recv(100) == b""


def test_end_of_an_output_is_told_while_the_target_runs(vshd: Vshd) -> None:
    """Though it most often is a part of the target's own end, and leaves with that."""
    client, setup = make_setup(b"sh", b"-c", b"exec >&-; read line; exit 4", limits=default_limits())
    with vshd.connect() as connection:
        connection.sendall(setup)
        events: list[Event] = []
        while EndOfStream not in map(type, events):
            events += client.receive_data(connection.recv(100))
        assert not client.receiving[messages.STDERR].is_ended
        client.send_end(messages.STDIN)
        connection.sendall(client.output.take())
        end = read_events(connection, client)[-1]
        assert isinstance(end, Exited) and end.code == 4


# A spare


def test_spare_serves_the_next_connection(start_vshd: StartVshd, mode: list[str]) -> None:
    vshd = start_vshd("--spare_time=60")
    assert vshd.run("--", "true").returncode == 0
    for _ in range(5):
        wait_until(lambda: len(vshd.children()) == 1, "a spare waits")
        spares = vshd.children()
        with ended(vshd.start(*mode, "--", "sh", "-c", "echo $PPID; cat", stdin=subprocess.PIPE)) as client:
            assert [int(read_line(client.stdout))] == spares
            client.stdin.close()
            assert client.wait(DEADLINE_S) == 0


def test_spare_is_dismissed_when_nobody_comes(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=1")
    vshd.run("--", "true")
    wait_until(lambda: not vshd.children(), "it is dismissed")
    assert vshd.run("--", "echo", "still").stdout == b"still\n"


def find_spare(vshd: Vshd) -> int:
    """Waits until the only process beside the daemon is a spare."""
    wait_until(lambda: len(vshd.children()) == 1, "a spare waits")
    (spare,) = vshd.children()
    return spare


def wait_for_spare(process: int) -> None:
    """Waits until a session's process is a spare again. It leaves the session's directory then."""
    wait_until(lambda: Path(f"/proc/{process}/cwd").readlink() == Path("/"), "it is a spare again")


def find_session(vshd: Vshd, *flags: str) -> int:
    """Runs a command, and returns the pid of its session's process."""
    done = vshd.run(*flags, "--", "sh", "-c", "echo $PPID")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.root
def test_process_of_a_session_serves_the_next_one_too(start_vshd: StartVshd) -> None:
    """And it starts each as it started the first: with nothing open or kept of the one before."""
    vshd = start_vshd("--spare_time=60")
    process = find_session(vshd)
    wait_for_spare(process)
    opened = {number for number, _ in read_descriptors(process)}
    show_score = "cat /proc/self/oom_score_adj"
    score = vshd.run("--", "sh", "-c", show_score).stdout

    def run(*words: str, data: bytes = b"") -> tuple[int, bytes]:
        wait_for_spare(process)
        done = vshd.run(*words, input=data)
        return done.returncode, done.stdout

    assert run("--cwd=/tmp", "--env=OF=us", "--", "sh", "-c", "echo $OF; exec cat", data=b"in") == (0, b"us\nin")
    assert run("-t", "--", "true")[0] == 0
    assert run("--", "cat", data=bytes(1 << 18)) == (0, bytes(1 << 18))
    assert run("--", "sh", "-c", "kill -9 $$")[0] == 128 + 9
    assert run("--", "sh", "-c", show_score) == (0, score)
    home = pwd.getpwuid(0).pw_dir
    assert run("--", "sh", "-c", "echo $OF; pwd; echo $PPID") == (0, f"\n{home}\n{process}\n".encode())
    wait_for_spare(process)
    assert {number for number, _ in read_descriptors(process)} == opened


@pytest.mark.root
@pytest.mark.parametrize(
    ("daemon", "flags"),
    [
        ([], ["--user=nobody"]),
        ([], ["--user=root:daemon"]),
        (["--max_processes=9999"], []),
        (["--max_memory=4096"], []),
    ],
)
def test_process_that_became_a_users_or_got_limits_serves_no_other(
    start_vshd: StartVshd, daemon: list[str], flags: list[str]
) -> None:
    vshd = start_vshd("--spare_time=60", *daemon)
    for _ in range(3):
        session = find_session(vshd, *flags)
        wait_for_end(session)


@pytest.mark.root
def test_process_whose_client_left_or_asked_for_nothing_serves_no_other(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    with ended(vshd.start("--", "sh", "-c", "echo $PPID; exec sleep 88")) as client:
        session = int(read_line(client.stdout))
        client.kill()
        wait_for_end(session)
    spare = find_spare(vshd)
    assert vshd.run("--", "/nonexistent").returncode == 127
    wait_for_end(spare)
    assert vshd.run("--", "echo", "still").stdout == b"still\n"


@pytest.mark.root
def test_process_keeps_no_memory_of_what_it_has_carried(start_vshd: StartVshd) -> None:
    """Sessions of some size leave no buffers, and a process that has carried bulk ends."""

    def measure(process: int) -> int:
        return int(Path(f"/proc/{process}/status").read_text().partition("VmRSS:")[2].split()[0])

    vshd = start_vshd("--spare_time=60")
    process = find_session(vshd)
    wait_for_spare(process)
    sizes_kib = [measure(process)]
    for _ in range(8):
        assert vshd.run("--cwd=/tmp", "--", "cat", input=bytes(1 << 15)).stdout == bytes(1 << 15)
        wait_for_spare(process)
        sizes_kib.append(measure(process))
    # Each had a receive buffer of 256 KiB.
    assert max(sizes_kib) - sizes_kib[0] < 1 << 10
    assert vshd.run("--", "cat", input=bytes(1 << 23)).stdout == bytes(1 << 23)
    wait_for_end(process)


@pytest.mark.root
def test_user_sees_nothing_of_the_process_that_served_root(start_vshd: StartVshd) -> None:
    """The session's process is the user's then, and a password of root's may still be in its memory."""
    if Path("/proc/sys/fs/suid_dumpable").read_text() == "1\n":
        pytest.skip("this kernel lets users look into processes that were root's")
    vshd = start_vshd("--spare_time=60")
    process = find_session(vshd)
    wait_for_spare(process)
    script = "echo $PPID; for name in mem fd/0 environ; do head -c 1 /proc/$PPID/$name && echo $name; done"
    done = vshd.run("--user=nobody", "--", "sh", "-c", script)
    assert done.stdout == b"%d\n" % process
    assert done.stderr.count(b"Permission denied") == 3


@pytest.mark.root
def test_long_sessions_do_not_keep_short_ones_from_a_spare(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    with contextlib.ExitStack() as stack:
        for _ in range(9):
            client = stack.enter_context(ended(vshd.start("--", "sh", "-c", "echo in; cat", stdin=subprocess.PIPE)))
            assert read_line(client.stdout) == "in"
        session = find_session(vshd, "--cwd=/tmp")
        wait_for_spare(session)
        assert find_session(vshd) == session


@pytest.mark.root
def test_many_at_once_leave_one_spare(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(ended(vshd.start("--", "cat", stdin=subprocess.PIPE))) for _ in range(12)]
        for client in clients:
            client.stdin.write(b"x")
            client.stdin.flush()
            assert client.stdout.read(1) == b"x"
        for client in clients:
            client.stdin.close()
            assert client.wait(DEADLINE_S) == 0
    find_spare(vshd)


def test_spare_that_was_killed_is_no_loss(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    for _ in range(5):
        assert vshd.run("--", "true").returncode == 0
        spare = find_spare(vshd)
        os.kill(spare, signal.SIGKILL)
        # A process that is only about to die may still be given a session, and lose it as any killed one does.
        wait_for_end(spare)
    assert vshd.run("--", "echo", "still").stdout == b"still\n"
    wait_until(lambda: "vshd: a spare, without a client: the session's process ended with -9\n" in vshd.log, "a line")
    assert "vshd: :" not in vshd.log


def test_spare_ends_with_the_daemon(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    vshd.run("--", "true")
    wait_until(lambda: len(vshd.children()) == 1, "a spare waits")
    (spare,) = vshd.children()
    vshd.process.kill()
    vshd.process.wait()
    wait_for_end(spare)
    vshd.process.returncode = 0


@pytest.mark.root
def test_spare_of_a_root_that_may_not_raise_priorities(start_vshd: StartVshd) -> None:
    """As in a container."""
    vshd = start_vshd("--spare_time=60", wrapper=["setpriv", "--bounding-set", "-sys_nice"])
    for _ in range(3):
        assert int(vshd.run("--", "nice").stdout) == os.nice(0)
        wait_until(lambda: len(vshd.children()) == 1, "a spare waits")


@pytest.mark.root
def test_spare_runs_at_the_daemons_priority(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--spare_time=60")
    vshd.run("--", "true")
    wait_until(lambda: len(vshd.children()) == 1, "a spare waits")
    assert int(vshd.run("--", "nice").stdout) == os.nice(0)
