"""Our programs' own output on a descriptor that another program made non-blocking, with a reader that comes late."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Vshd
from vsh.patience import write_patiently

# What a program has to write its text in; it may well be slower.
LATE_S = 1.0


def run_with_a_late_reader(words: list[str], name: str) -> tuple[int, bytes]:
    """The exit status, and what came through the full, non-blocking pipe that is the program's stdout or stderr."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = os.write(writing, bytes(1 << 16))
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=ENVIRONMENT,
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=writing if name == "stdout" else subprocess.DEVNULL,
        stderr=writing if name == "stderr" else subprocess.DEVNULL,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(LATE_S)
        # The flag is the other program's.
        assert not os.get_blocking(writing)
        os.close(writing)
        data = b"".join(iter(lambda: os.read(reading, 1 << 16), b""))
        os.close(reading)
        return process.wait(DEADLINE_S), data[filled:]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "name", "status", "text"),
    [
        (["vsh", "--help"], "stdout", 0, b"usage: vsh"),
        (["vsh", "--vm_name=nosuch"], "stderr", 1, b"vsh: no machine"),
        (["vmkit", "--help"], "stdout", 0, b"Usage: vmkit"),
        (["vmkit", "images"], "stdout", 0, b"tiny"),
        (["vmkit", "status", "nosuch"], "stderr", 1, b"vmkit: "),
    ],
)
def test_text_waits_for_a_late_reader(words: list[str], name: str, status: int, text: bytes) -> None:
    ended, data = run_with_a_late_reader(words, name)
    assert ended == status
    assert text in data
    assert data.endswith(b"\n")


def test_text_about_a_session_waits_for_a_late_reader(vshd: Vshd) -> None:
    words = ["vsh", *vshd.where, "--debug", "--", "true"]
    ended, data = run_with_a_late_reader(words, "stderr")
    assert ended == 0
    assert b"pid " in data
    assert b"vsh: debug:" in data


def test_writer_learns_that_the_reader_is_gone(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        write_patiently(writing, b"x")
    os.close(writing)


@pytest.mark.parametrize("is_blocking", [True, False])
def test_program_whose_reader_takes_nothing_can_be_interrupted(*, is_blocking: bool) -> None:
    """As with a pager that shows its first page, or that was interrupted itself."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    os.write(writing, bytes(1 << 16))
    os.set_blocking(writing, is_blocking)
    words = [sys.executable, "-m", "vmkit", "--help"]
    process = subprocess.Popen(words, stdout=writing, stderr=subprocess.PIPE, cwd=CHECKOUT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(LATE_S)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=DEADLINE_S)[1] == b""
    assert process.returncode == 128 + signal.SIGTERM
    os.close(reading)
    os.close(writing)
