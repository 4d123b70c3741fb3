"""vsh in the background of its terminal: under timeout(1), in a job of a script, behind `&`. It is never stopped."""

import shlex
import sys
import termios
from pathlib import Path

import pytest

from tests.vsh.live import Vshd, wait_until
from tests.vsh.typist import Typist

JOBS = ["bash", "--norc", "--noprofile", "-i"]


def vsh(vshd: Vshd, *words: str) -> str:
    return shlex.join([sys.executable, "-m", "vsh", *vshd.where, *words])


def run_script(text: str) -> list[bytes]:
    """Runs a shell script at a terminal, which is as it was afterwards; returns the words it printed."""
    typist = Typist(["bash", "--norc", "-c", text])
    try:
        before = typist.expect(b" the end\r\n")
        assert typist.wait() == 0
        assert typist.is_restored()
        return before.split()
    finally:
        typist.close()


@pytest.mark.parametrize("line", ["timeout 20 {}", "set -m; {} & wait $!"])
def test_background_job_of_a_script_runs_to_its_end(vshd: Vshd, mode: list[str], line: str) -> None:
    command = vsh(vshd, *mode, "--", "sh", "-c", "echo hi; exit 7")
    words = run_script(f"{line.format(command)}; echo rc=$? the end")
    assert (words[0], words[-1]) == (b"hi", b"rc=7")


def test_line_of_a_makefile_under_timeout_runs_to_its_end(vshd: Vshd, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"all:\n\t@timeout 20 {vsh(vshd, '--', 'echo', 'hi')}\n")
    assert run_script(f"make -sC {tmp_path}; echo rc=$? the end") == [b"hi", b"rc=0"]


def test_forced_terminal_in_the_background_leaves_the_local_one_alone(vshd: Vshd, mode: list[str]) -> None:
    command = vsh(vshd, *mode, "-t", "--", "sh", "-c", "tty >/dev/null && echo hi")
    assert run_script(f"timeout 20 {command}; echo rc=$? the end") == [b"hi", b"rc=0"]


def test_job_that_a_shell_starts_in_the_background_runs(vshd: Vshd, mode: list[str]) -> None:
    typist = Typist(JOBS)
    try:
        typist.type(f"PS1='%%'; {vsh(vshd, *mode, '--', 'echo', 'one')} & wait; jobs; echo t''wo\r".encode())
        typist.expect(b"one\r\n")
        assert b"Stopped" not in typist.expect(b"two\r\n")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()


def test_forced_terminal_becomes_raw_when_its_job_comes_to_the_foreground(vshd: Vshd, mode: list[str]) -> None:
    script = "echo st''arted; read x; echo [$x]"
    typist = Typist(JOBS)
    try:
        typist.type(f"PS1='%%'; {vsh(vshd, *mode, '-t', '--', 'sh', '-c', script)} &\r".encode())
        typist.expect(b"started")
        typist.type(b"echo sh''ell $(jobs | grep -c Running)\r")
        typist.expect(b"shell 1\r\n")
        typist.type(b"fg\r")
        typist.expect(b"read x")
        wait_until(lambda: is_raw(typist), "vsh has the terminal")
        typist.type(b"hello\r")
        typist.expect(b"[hello]\r\n")
        typist.expect(b"%%")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()


def test_session_continued_in_the_background_is_not_stopped_again(vshd: Vshd, mode: list[str]) -> None:
    """~^Z, bg: it runs on, and has the terminal again with fg."""
    script = "echo st''arted; read x; echo [$x]"
    typist = Typist(JOBS)
    try:
        typist.type(f"PS1='%%'; {vsh(vshd, *mode, '--', 'sh', '-c', script)}\r".encode())
        typist.expect(b"started\r\n")
        wait_until(lambda: is_raw(typist), "vsh has the terminal")
        typist.type(b"~\x1a")
        typist.expect(b"Stopped")
        typist.type(b"bg\r")
        typist.expect(b"&\r\n")
        typist.type(b"sleep 0.5; echo sh''ell $(jobs | grep -c Running)\r")
        typist.expect(b"shell 1\r\n")
        typist.type(b"fg\r")
        typist.expect(b"read x")
        wait_until(lambda: is_raw(typist), "vsh has the terminal")
        typist.type(b"hello\r")
        typist.expect(b"[hello]\r\n")
        typist.expect(b"%%")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()


def test_session_stopped_from_outside_has_a_raw_terminal_when_it_returns(vshd: Vshd, mode: list[str]) -> None:
    """SIGSTOP leaves no time to restore: the shell sets the terminal for itself, and vsh for itself again."""
    script = "echo st''arted $PPID; read x; echo [$x]"
    typist = Typist(JOBS)
    try:
        typist.type(f"PS1='%%'; {vsh(vshd, *mode, '--', 'sh', '-c', script)}\r".encode())
        typist.expect(b"started")
        wait_until(lambda: is_raw(typist), "vsh has the terminal")
        typist.stop_foreground()
        typist.expect(b"Stopped")
        typist.expect(b"%%")
        typist.type(b"fg\r")
        typist.expect(b"read x")
        wait_until(lambda: is_raw(typist), "vsh has the terminal again")
        typist.type(b"hello\r")
        typist.expect(b"[hello]\r\n")
        typist.expect(b"%%")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()


def is_raw(typist: Typist) -> bool:
    """As vsh makes it: a shell that edits a line keeps its signals."""
    return not termios.tcgetattr(typist.slave)[3] & (termios.ICANON | termios.ISIG)
