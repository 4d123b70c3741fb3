"""vshd --inetd and --activate over UNIX sockets: commands started by connections."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, START, is_alive, wait_until


@contextlib.contextmanager
def serving(
    tmp_path: Path, flag: str, *command: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A vshd in one of the two modes; gives its socket's path and the process."""
    path = tmp_path / "service.sock"
    notify_path = tmp_path / "notify.sock"
    errors = tmp_path / "errors"
    # Not a pipe: a command that outlives the daemon holds it open.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, errors.open("wb") as log:
        notify.bind(str(notify_path))
        notify.settimeout(DEADLINE_S)
        argv = [sys.executable, "-I", "-S", "-B", "-c", START.format(str(CHECKOUT))]
        process = subprocess.Popen(
            [*argv, flag, f"unix:{path}", "--log_stderr", *flags, "--", *command],
            env={**ENVIRONMENT, "NOTIFY_SOCKET": str(notify_path), **(env or {})},
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        try:
            assert notify.recv(100) == b"READY=1\n"
            yield path, process
        finally:
            process.terminate()
            process.wait(DEADLINE_S)
            notify_path.unlink()
    assert process.returncode == 0, errors.read_text()
    assert not path.exists()


def talk(path: Path, data: bytes = b"") -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        if data:
            # A server that reads nothing may have answered and gone.
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(1 << 16):
            answer += more
        return answer


def test_connection_is_the_commands_stdin_and_stdout(tmp_path: Path) -> None:
    with serving(tmp_path, "--inetd", "sh", "-c", "echo hello; wc -c") as (path, _):
        assert talk(path, bytes(300_000)) == b"hello\n300000\n"
        assert talk(path) == b"hello\n0\n"


def test_command_starts_as_a_fresh_process_would(tmp_path: Path) -> None:
    script = "grep -E 'Sig(Ign|Blk)' /proc/self/status; cut -d' ' -f6 /proc/$$/stat; echo $$; ls /proc/$$/fd"
    with serving(tmp_path, "--inetd", "sh", "-c", script) as (path, _):
        words = talk(path).split()
    # 32 and 33 are the C library's own: nobody else can set them.
    assert [int(word, 16) & ~(3 << 31) for word in (words[1], words[3])] == [0, 0]
    assert words[4] == words[5], "a session of its own"
    assert words[6:] == [b"0", b"1", b"2"]


def test_connections_are_served_side_by_side(tmp_path: Path) -> None:
    with serving(tmp_path, "--inetd", "cat") as (path, _):
        clients = [socket.socket(socket.AF_UNIX) for _ in range(20)]
        for client in clients:
            client.connect(str(path))
        for number, client in reversed(list(enumerate(clients))):
            client.sendall(b"%d" % number)
            assert client.recv(10) == b"%d" % number
            client.close()


def test_limit_makes_others_wait(tmp_path: Path) -> None:
    with (
        serving(tmp_path, "--inetd", "cat", flags=["--max_sessions=1"]) as (path, _),
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_UNIX) as second,
    ):
        first.connect(str(path))
        first.sendall(b"1")
        assert first.recv(1) == b"1"
        second.connect(str(path))
        second.sendall(b"2")
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.close()
        second.settimeout(DEADLINE_S)
        assert second.recv(1) == b"2"


def test_unknown_command_costs_the_connection_only(tmp_path: Path) -> None:
    with serving(tmp_path, "--inetd", "/nonexistent") as (path, process):
        assert talk(path) == b""
        assert talk(path) == b""
        assert process.poll() is None


@pytest.mark.parametrize("flags", [(), ("--end_sessions",)], ids=["by default", "with --end_sessions"])
def test_end_of_the_daemon_ends_the_commands_only_if_asked(tmp_path: Path, flags: Sequence[str]) -> None:
    with (
        serving(tmp_path, "--inetd", "sh", "-c", "echo $$; exec cat", flags=flags) as (path, _),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(DEADLINE_S)
        client.connect(str(path))
        pid = int(client.recv(20))
        assert is_alive(pid)
        # The daemon ends with the inner block; the client stays.
        connection = socket.socket(fileno=client.detach())
    with connection:
        connection.settimeout(DEADLINE_S)
        if not flags:
            connection.sendall(b"still\n")
            assert connection.recv(100) == b"still\n"
            connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: not is_alive(pid), "the command has ended")


SERVER = """
import os, socket, sys
assert os.environ["LISTEN_FDS"] == "1" and os.environ["LISTEN_PID"] == str(os.getpid())
listener = socket.socket(fileno=3)
for _ in range(int(sys.argv[1])):
    connection, _ = listener.accept()
    connection.sendall(b"%d" % os.getpid())
    connection.close()
"""


def test_one_command_gets_the_listening_socket(tmp_path: Path) -> None:
    with serving(tmp_path, "--activate", sys.executable, "-c", SERVER, "3") as (path, process):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert children.read_text() == "", "it is started by the first connection"
        pids = [int(talk(path)) for _ in range(3)]
        assert len(set(pids)) == 1
        # Having served three it ended; the next connection starts another.
        assert int(talk(path)) != pids[0]


def test_command_that_never_accepts_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, "--activate", "true") as (path, process), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert process.wait(DEADLINE_S) == 0


def test_socket_of_systemd_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "passed.sock"
    script = f"import os, sys; sys.path.insert(0, {str(CHECKOUT)!r}); os.environ['LISTEN_PID'] = str(os.getpid());"
    script += "os.dup2(int(sys.argv.pop()), 3); from vshd.__main__ import main; sys.exit(main())"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                script,
                "--inetd=unix:/nowhere/x",
                "--log_stderr",
                "--",
                "echo",
                "passed",
                str(listener.fileno()),
            ],
            env={**ENVIRONMENT, "LISTEN_FDS": "1"},
            stderr=subprocess.PIPE,
            pass_fds=[listener.fileno()],
        )
    assert talk(path) == b"passed\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


@pytest.mark.parametrize("words", [["--inetd", "22"], ["--inetd=22", "--"], ["--activate", "22"], ["--", "cat"]])
def test_command_goes_with_its_modes(words: list[str]) -> None:
    argv = [sys.executable, "-m", "vshd", *words]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_S)
    assert done.returncode in (1, 65)
    assert b"command" in done.stderr
