"""--debug, -v, -q, and the launcher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd, ended, read_line
from vsh.trace import describe_message
from vshd.wire import messages


def test_debug_shows_every_frame(vshd: Vshd) -> None:
    done = vshd.run("--debug", "--", "sh", "-c", "echo hi; exit 3")
    assert (done.returncode, done.stdout) == (3, b"hi\n")
    lines = [line.split(" ms ", 1)[1] for line in done.stderr.decode().splitlines() if " ms " in line]
    assert lines[0].startswith("> ")
    assert "SetupConnectionRequest target=b'/vm_shell'" in lines[0]
    assert "SetupConnectionResponse status=1 description=b'vsh ready'" in lines[1]
    assert any("data_message {stream=2 3 bytes}" in line for line in lines)
    assert any("data_message {stream=2 end}" in line for line in lines)
    assert "status_message {status=2" in lines[-1]


def test_debug_shows_where_a_failure_was_found(vshd: Vshd) -> None:
    done = vshd.run("--debug", "--cid=3", "--unix=x", "--", "true")
    assert b"Traceback" in done.stderr
    assert done.returncode == 1


def test_nothing_shows_a_traceback_without_debug(vshd: Vshd) -> None:
    done = vshd.run("--cid=3", "--unix=x", "--", "true")
    assert b"Traceback" not in done.stderr


def test_verbose_says_what_it_reached(vshd: Vshd) -> None:
    done = vshd.run("-v", "--", "true")
    assert b"mode" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_quiet_says_nothing_of_a_lost_connection(vshd: Vshd) -> None:
    with ended(vshd.start("-q", "--", "sh", "-c", "echo up; sleep 83")) as client:
        read_line(client.stdout)
        for pid in vshd.children():
            os.kill(pid, signal.SIGKILL)
        assert client.wait(DEADLINE_S) == 123
        assert client.stderr.read() == b""


def test_messages_are_described_on_one_line() -> None:
    text = describe_message(messages.GuestMessage(messages.CREDIT, messages.CreditMessage(2, 100)))
    assert text == "credit {stream=2 bytes=100}"
    assert describe_message(messages.GuestMessage()) == "GuestMessage of an unknown kind"
    assert "..." in describe_message(messages.SetupConnectionRequest(argv=[b"x" * 100]))


def test_launcher_launches(vshd: Vshd, tmp_path: Path) -> None:
    script = subprocess.run([*vshd.argv()[:3], "--launcher"], env=ENVIRONMENT, capture_output=True, check=True).stdout
    launcher = tmp_path / "vsh"
    launcher.write_bytes(script)
    launcher.chmod(0o755)
    done = subprocess.run(
        [str(launcher), f"--unix={vshd.path}", "--", "echo", "hi"],
        env={"PATH": "/usr/bin:/bin", "VSH_CONFIG": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (0, b"hi\n"), done.stderr


def test_help_for_nobody_is_no_traceback(vshd: Vshd) -> None:
    script = '"$@" --help 2>&1 >/dev/full; "$@" --help | true; "$@" --nonsense 2>&-; echo $?'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *vshd.argv()[:3]],
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.stdout.endswith(b"64\n")


@pytest.mark.parametrize(
    ("program", "word"),
    [
        ("vsh", "--help"),
        ("vsh", "--version"),
        ("vsh", "--completion=bash"),
        ("vsh", "--launcher"),
        ("vshd", "--help"),
        ("vshd", "--version"),
    ],
)
def test_answer_that_cannot_be_written(program: str, word: str) -> None:
    """The reader has gone: silence, and a shell's status for SIGPIPE. The disk is full: one line."""
    argv = [sys.executable, "-m", program, word]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(argv, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + 13, b"")
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - the tests of vsh use os's names
        done = subprocess.run(argv, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == f"{program}: cannot write the answer: No space left on device\n".encode()
