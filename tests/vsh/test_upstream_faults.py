"""The failures measured with ChromeOS's own vsh and vshd, one test per row: ours must not have them."""

import fcntl
import os
import random
import select
import signal
import subprocess
import termios
import time
from pathlib import Path
from typing import IO

import pytest

from tests.vsh.live import (
    DEADLINE_S,
    StartVshd,
    Vshd,
    cpu_seconds,
    ended,
    is_alive,
    read_line,
    wait_for_end,
    wait_until,
)


@pytest.fixture(scope="module")
def noise() -> bytes:
    return random.Random(8).randbytes(1 << 20)


def test_stdin_is_a_regular_file(vshd: Vshd, mode: list[str], tmp_path: Path, noise: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise)
    with path.open("rb") as file:
        done = vshd.run(*mode, "--", "cat", stdin=file)
    assert (done.returncode, done.stdout) == (0, noise)


def test_stdin_is_dev_null(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--", "cat", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, b"")


def test_filter_that_writes_more_than_it_reads(vshd: Vshd, mode: list[str], noise: bytes) -> None:
    """head -c 100000 rnd | vsh -- od -An -v -tx1"""
    expected = subprocess.run(["od", "-An", "-v", "-tx1"], input=noise[:100_000], capture_output=True, check=True)
    done = vshd.run(*mode, "--", "od", "-An", "-v", "-tx1", input=noise[:100_000])
    assert (done.returncode, done.stdout) == (0, expected.stdout)


def test_megabyte_through_cat(vshd: Vshd, mode: list[str], noise: bytes) -> None:
    for _ in range(8):
        done = vshd.run(*mode, "--", "cat", input=noise)
        assert (done.returncode, done.stdout) == (0, noise)


def test_sigpipe_is_not_ignored_in_the_target(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--", "sh", "-c", "yes | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"y\n", b"")


def test_stopped_target_has_not_exited(vshd: Vshd, mode: list[str]) -> None:
    script = "(sleep 0.2; kill -CONT $$) & kill -STOP $$; wait; exit 7"
    assert vshd.run(*mode, "--", "sh", "-c", script).returncode == 7


def test_clients_variable_wins_over_the_inherited_one(start_vshd: StartVshd, mode: list[str]) -> None:
    vshd = start_vshd("--inherit_env", env={"LANG": "daemon", "ONLY_DAEMON": "1"})
    done = vshd.run(*mode, "--", "LANG=client", "sh", "-c", "echo $LANG $ONLY_DAEMON")
    assert done.stdout == b"client 1\n"


def test_killed_client_leaves_nothing_behind(vshd: Vshd, mode: list[str]) -> None:
    with ended(vshd.start(*mode, "--", "sh", "-c", "echo $$; sleep 94 & echo $!; wait")) as client:
        pids = [int(read_line(client.stdout)) for _ in range(2)]
        client.kill()
        for pid in pids:
            wait_for_end(pid)
    wait_until(lambda: not vshd.children(), "the session's process has ended")


def test_signal_reaches_the_whole_group(vshd: Vshd, mode: list[str]) -> None:
    with ended(vshd.start(*mode, "--", "sh", "-c", "sleep 95 & echo $!; wait")) as client:
        sleeper = int(read_line(client.stdout))
        client.send_signal(signal.SIGTERM)
        assert client.wait(DEADLINE_S) == (15 if mode else 128 + 15)
        wait_for_end(sleeper)


def test_terminal_closed_by_its_target_costs_nothing(vshd: Vshd, mode: list[str]) -> None:
    before, began_s = cpu_seconds(vshd.pid), time.monotonic()
    done = vshd.run(*mode, "-t", "--", "sh", "-c", "exec <&- >&- 2>&-; sleep 2")
    assert done.returncode == 0
    wait_until(lambda: not vshd.children(), "the session's process is reaped")
    # A daemon that spins takes all of a processor. In a guest of a busy host, a session alone was counted 0.6 s.
    assert cpu_seconds(vshd.pid) - before < (time.monotonic() - began_s) / 2


def test_signal_passes_a_stalled_stdout(vshd: Vshd, mode: list[str], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fifo_fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = f'yes & trap "echo got > {fifo}; exit 3" TERM; wait'
    with ended(vshd.start(*mode, "--", "sh", "-c", script)) as client:
        sizes = [0]
        wait_until(lambda: _is_stalled(client.stdout, sizes), "stdout is stalled")
        client.send_signal(signal.SIGTERM)
        ready, _, _ = select.select([fifo_fd], [], [], DEADLINE_S)
        assert ready
        assert os.read(fifo_fd, 10) == b"got\n"
        os.close(fifo_fd)
        client.communicate(timeout=DEADLINE_S)
        assert client.returncode == 3


def _is_stalled(stream: IO[bytes], sizes: list[int]) -> bool:
    """Something waits in the pipe, and it has not become more for a while."""
    sizes.append(int.from_bytes(fcntl.ioctl(stream, termios.FIONREAD, b"\0\0\0\0"), "little"))
    return sizes[-1] > 0 and len(set(sizes[-20:])) == 1


def test_silent_peer_is_let_go(start_vshd: StartVshd) -> None:
    vshd = start_vshd("--handshake_timeout=1")
    started = time.monotonic()
    with vshd.connect() as connection:
        assert connection.recv(1) == b""
    assert 0.9 < time.monotonic() - started < 10
    wait_until(lambda: not vshd.children(), "the session's process has ended")
    assert "no request within 1 s" in vshd.log


def test_long_command_line(vshd: Vshd) -> None:
    word = "x" * 4200
    done = vshd.run("--", "echo", word)
    assert (done.returncode, done.stdout) == (0, word.encode() + b"\n")


def test_long_command_line_with_a_legacy_peer(start_vshd: StartVshd, vshd: Vshd) -> None:
    word = "x" * 4200
    done = vshd.run("--noextended", "--", "echo", word)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"Serialized message too large: 42" in done.stderr
    done = start_vshd("--noextended").run("--", "echo", word)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"does not speak the extended protocol" in done.stderr


def test_empty_value_is_an_assignment(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--", "A=", "B=b=c", "sh", "-c", 'echo "${A-unset}|$B"')
    assert (done.returncode, done.stdout) == (0, b"|b=c\n")


def test_command_not_found(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "--", "no-such-command")
    assert (done.returncode, done.stdout) == (127, b"")
    assert b"no-such-command: command not found" in done.stderr
    assert vshd.run(*mode, "--", "/no/such/file").returncode == 127


def test_command_not_executable(vshd: Vshd, mode: list[str], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("echo hi\n")
    for path in (plain, tmp_path):
        done = vshd.run(*mode, "--", str(path))
        assert (done.returncode, done.stdout) == (126, b"")
        assert b"Permission denied" in done.stderr


@pytest.mark.parametrize("number", [1, 2, 9, 11, 15])
def test_death_by_signal_is_told_from_an_exit(vshd: Vshd, number: int) -> None:
    script = f"kill -{number} $$"
    assert vshd.run("--", "sh", "-c", script).returncode == 128 + number
    assert vshd.run("--noextended", "--", "sh", "-c", script).returncode == number
    assert vshd.run("--", "sh", "-c", f"exit {number}").returncode == number


def test_nothing_is_left_in_the_guest(vshd: Vshd) -> None:
    """After all of the above: no session's process, and no descriptor but vshd's own: stdio, listener, two pipes."""
    wait_until(lambda: not vshd.children(), "all sessions have ended")
    assert is_alive(vshd.pid)
    assert len(os.listdir(f"/proc/{vshd.pid}/fd")) == 8
