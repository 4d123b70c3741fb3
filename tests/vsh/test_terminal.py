"""vsh in a terminal: a real pty on both sides."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.vsh.live import StartVshd, Vshd, wait_for_end, wait_until
from tests.vsh.typist import Typist, typing

SHELL = ("--", "PS1=[$?]", "ENV=", "sh")


def test_shell_has_a_terminal_of_the_right_size(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode, *SHELL) as typist:
        typist.expect(b"[0]")
        typist.type(b"tty | cut -c1-9; stty size\r")
        typist.expect(b"/dev/pts/\r\n30 100\r\n")
        typist.type(b"exit 5\r")
        assert typist.wait() == 5
        assert typist.is_restored()


def test_login_shell_is_a_login_shell(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode) as typist:
        typist.type(b"echo [$0]; exit 3\r")
        typist.expect(b"[-")
        assert typist.wait() == 3


def test_window_size_follows(vshd: Vshd, mode: list[str]) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do read x; done"
    with typing(vshd, *mode, "--", "sh", "-c", script) as typist:
        typist.expect(b"ready")
        typist.resize(41, 123)
        typist.expect(b"41 123\r\n")


WINDOW = """
import fcntl, os, signal, struct, sys, termios
# Blocked: a handler of Python's would miss a signal right before pause(2).
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
while True:
    os.write(1, b"%d %d %d %d\\n" % struct.unpack("HHHH", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))))
    signal.sigwait({signal.SIGWINCH})
"""


@pytest.mark.parametrize("flags", [[], ["--noextended"]], ids=["extended", "legacy"])
def test_size_in_pixels_comes_with_the_size(vshd: Vshd, flags: list[str]) -> None:
    """ChromeOS's protocol has no place for it."""
    first, second = ("30 100 0 0", "41 123 0 0") if flags else ("30 100 1000 600", "41 123 990 820")
    with typing(vshd, *flags, "--", sys.executable, "-c", WINDOW) as typist:
        typist.expect(first.encode())
        typist.resize(41, 123, pixels=(990, 820))
        typist.expect(second.encode())
        typist.type(b"\r~.")


def test_ctrl_c_interrupts_the_foreground_only(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode, *SHELL) as typist:
        typist.expect(b"[0]")
        # Said by the foreground job itself: before that, Ctrl-C would be the shell's.
        typist.type(b"sh -c 'echo $((6*7)); exec sleep 98'\r")
        typist.expect(b"42\r\n")
        typist.type(b"\x03")
        typist.expect(b"[130]")
        typist.type(b"exit\r")
        assert typist.wait() == 130


def test_ctrl_d_ends_the_shell(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode, *SHELL) as typist:
        typist.expect(b"[0]")
        typist.type(b"\x04")
        assert typist.wait() == 0


def test_full_screen_program_draws_and_leaves(vshd: Vshd) -> None:
    with typing(
        vshd, "--", "sh", "-c", "stty raw -echo; printf '\\033[2J'; head -c1 | od -An -tx1; stty sane"
    ) as typist:
        typist.expect(b"\x1b[2J")
        typist.type(b"\x1b")
        typist.expect(b"1b")
        assert typist.wait() == 0
        assert typist.is_restored()


def test_terminal_is_raw_only_during_the_session(vshd: Vshd) -> None:
    with typing(vshd, "--", "sh", "-c", "echo ready; read x") as typist:
        typist.expect(b"ready")
        assert typist.is_raw()
        typist.type(b"\r")
        assert typist.wait() == 0
        assert typist.is_restored()
    with typing(vshd, "--user=no-such-user") as typist:
        assert typist.wait() == 1
        assert typist.is_restored()


def test_tilde_dot_disconnects(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode, "--", "sh", "-c", "echo $$; exec sleep 99") as typist:
        pid = int(typist.expect(b"\r\n"))
        typist.type(b"\r~.")
        assert typist.wait() == 123
        typist.expect(b"vsh: disconnected from")
        assert typist.is_restored()
        wait_for_end(pid)


def test_tilde_question_mark_helps(vshd: Vshd) -> None:
    with typing(vshd, *SHELL) as typist:
        typist.expect(b"[0]")
        typist.type(b"~?")
        typist.expect(b"~.   disconnect")
        typist.type(b"echo still $((40+2))\r")
        typist.expect(b"still 42\r\n")


def test_tilde_ctrl_z_suspends_and_returns(vshd: Vshd) -> None:
    """Under a shell with job control, as a person would: ~^Z, fg."""
    # The typed command is on the screen as well: what it prints must look different.
    script = "echo rea''dy; read x; echo [$x]"
    command = shlex.join([sys.executable, "-m", "vsh", *vshd.where, "--", "sh", "-c", script])
    typist = Typist(["bash", "--norc", "-i"])
    try:
        typist.type(f"PS1='%%'; {command}\r".encode())
        typist.expect(b"ready")
        typist.expect(b"\r\n")
        wait_until(typist.is_raw, "vsh is in raw mode")
        typist.type(b"~\x1a")
        typist.expect(b"Stopped")
        typist.expect(b"%%")
        typist.type(b"fg\r")
        typist.expect(b"dy; read x")
        wait_until(typist.is_raw, "vsh is in raw mode again")
        typist.type(b"back\r")
        typist.expect(b"[back]")
        typist.expect(b"%%")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_when_vsh_is_told_to_end(vshd: Vshd, mode: list[str], number: signal.Signals) -> None:
    with typing(vshd, *mode, "--", "sh", "-c", "echo ready; exec sleep 96") as typist:
        typist.expect(b"ready")
        typist.process.send_signal(number)
        typist.wait()
        assert typist.is_restored()


def test_terminal_is_restored_when_the_server_is_killed(start_vshd: StartVshd) -> None:
    vshd = start_vshd()
    with typing(vshd, "--", "sh", "-c", "echo ready; exec sleep 95") as typist:
        typist.expect(b"ready")
        for pid in vshd.children():
            os.kill(pid, signal.SIGKILL)
        assert typist.wait() == 123
        assert typist.is_restored()
        typist.expect(b"vsh: lost the connection")


def test_lost_terminal_hangs_the_session_up(vshd: Vshd, mode: list[str], tmp_path: Path) -> None:
    # Not in read: the kernel wakes readers before it sends HUP (pty_close()), and a shell may be gone by then. It sends
    # it to the session's leader alone, which is a shell that waits for its child first: TERM follows after a second.
    script = f"trap 'echo hup >{tmp_path}/hup; exit' HUP; echo $$; while :; do sleep 0.1; done"
    with typing(vshd, *mode, "--", "sh", "-c", script) as typist:
        pid = int(typist.expect(b"\r\n"))
        typist.process.kill()
        wait_for_end(pid)
        assert (tmp_path / "hup").read_text() == "hup\n"


def test_closed_window_ends_vsh_whatever_the_target_does(vshd: Vshd, mode: list[str]) -> None:
    """HUP alone is the target's to ignore; the end of the terminal is not."""
    with typing(vshd, *mode, "--", "sh", "-c", "trap '' HUP; echo $$; while :; do sleep 1; done") as typist:
        pid = int(typist.expect(b"\r\n"))
        wait_until(typist.is_raw, "vsh is in raw mode")
        typist.hang_up()
        # 129 for a shell in both cases: the kernel's HUP may come while vsh is on its way out already.
        assert typist.wait() in (128 + signal.SIGHUP, -signal.SIGHUP)
        wait_for_end(pid)


def test_t_asks_for_a_terminal_without_one(vshd: Vshd, mode: list[str]) -> None:
    done = vshd.run(*mode, "-t", "--", "sh", "-c", "tty >/dev/null && stty size")
    assert (done.returncode, done.stdout) == (0, b"24 80\r\n")


def test_capital_t_asks_for_none(vshd: Vshd, mode: list[str]) -> None:
    with typing(vshd, *mode, "-T", "--", "sh", "-c", "tty; exit 4") as typist:
        typist.expect(b"not a tty")
        assert typist.wait() == 4


def test_terminals_variables_travel(vshd: Vshd) -> None:
    with typing(vshd, "--", "sh", "-c", "echo $TERM") as typist:
        typist.expect(b"xterm\r\n")


def test_background_job_does_not_keep_the_session(vshd: Vshd, mode: list[str]) -> None:
    """As with ssh -t: the terminal ends with the shell."""
    with typing(vshd, *mode, "--", "bash", "--norc", "-ic", "sleep 20 & echo $!") as typist:
        assert typist.wait() == 0


def test_all_output_before_the_exit_arrives(vshd: Vshd, mode: list[str]) -> None:
    for _ in range(10):
        done = vshd.run(*mode, "-t", "--", "sh", "-c", "seq 1 5000")
        assert done.stdout.split() == [str(number).encode() for number in range(1, 5001)]


def test_background_job_is_not_stopped_by_what_is_typed_elsewhere(vshd: Vshd, mode: list[str]) -> None:
    """vsh ... & leaves the terminal to the shell, and takes it up again when it comes to the foreground."""
    script = "echo st''arted; read x; echo [$x]"
    words = [sys.executable, "-m", "vsh", *vshd.where, *mode, "-T", "--", "sh", "-c", script]
    typist = Typist(["bash", "--norc", "-i"])
    try:
        typist.type(f"PS1='%%'; {shlex.join(words)} &\r".encode())
        typist.expect(b"started\r\n")
        typist.type(b"echo sh''ell $(jobs | grep -c Running)\r")
        typist.expect(b"shell 1\r\n")
        typist.type(b"\r\r")
        typist.type(b"echo sti''ll $(jobs | grep -c Running)\r")
        typist.expect(b"still 1\r\n")
        typist.type(b"fg\r")
        typist.expect(b"read x")
        typist.type(b"hello\r")
        typist.expect(b"[hello]\r\n")
        typist.expect(b"%%")
        typist.type(b"exit\r")
        typist.wait()
    finally:
        typist.close()
