"""A terminal after a full-screen program whose connection ended: what the program took is given back."""

import os
import random
import signal

import pytest

from tests.vsh.live import Vshd, wait_until
from tests.vsh.typist import typing
from vsh.modes import TerminalModes

FULL_SCREEN = b"\x1b[?1049h\x1b[?25l\x1b[?1000;1006h\x1b[?2004h\x1b="
RESET = b"\x1b[0m\x1b[?1000l\x1b[?1006l\x1b[?25h\x1b[?2004l\x1b[?1049l\x1b>"


@pytest.mark.parametrize(
    ("output", "reset"),
    [
        (b"", b""),
        (b"\x1b[31mred\x1b[m \x1b]0;title\x07", b""),
        (FULL_SCREEN, RESET),
        (FULL_SCREEN + b"\x1b[?1049l\x1b[?25h\x1b[?1000l\x1b[?1006l\x1b[?2004l\x1b>", b""),
        (FULL_SCREEN + b"\x1bc", b""),
        # On by default: a program that turns them on has changed nothing.
        (b"\x1b[?25h\x1b[?7h", b""),
        (b"\x1b[?7l", b"\x1b[0m\x1b[?7h"),
        # Modes that vsh does not know, and no modes at all.
        (b"\x1b[?9999h\x1b[25l\x1b[?1049\x1b[?h\x1b[?1049;", b""),
        (b"\x1b[?" + b"1" * 5000 + b"h", b""),
    ],
)
def test_only_what_was_changed_is_reset(output: bytes, reset: bytes) -> None:
    modes = TerminalModes()
    modes.feed(output)
    assert modes.render_reset() == reset


@pytest.mark.parametrize("seed", range(20))
def test_output_may_be_cut_anywhere(seed: int) -> None:
    rng = random.Random(seed)
    data = b"text" + FULL_SCREEN + b"\x1b[1mmore\n"
    modes = TerminalModes()
    while data:
        size = rng.randrange(1, 6)
        modes.feed(data[:size])
        data = data[size:]
    assert modes.render_reset() == RESET


def test_any_output_is_survived() -> None:
    rng = random.Random(1)
    for _ in range(300):
        modes = TerminalModes()
        for _ in range(10):
            modes.feed(bytes(rng.choice(b"\x1b[?;0147=>chl\x00\xff") for _ in range(rng.randrange(40))))
        modes.render_reset()


def test_screen_is_given_back_when_the_guest_is_gone(vshd: Vshd) -> None:
    script = r"printf '\033[?1049h\033[?25l'; echo drawn; sleep 97"
    with typing(vshd, "--", "sh", "-c", script) as typist:
        typist.expect(b"drawn")
        wait_until(lambda: len(vshd.children()) > 0, "the session's process is there")
        for pid in vshd.children():
            os.kill(pid, signal.SIGKILL)
        typist.expect(b"\x1b[0m\x1b[?25h\x1b[?1049l")
        assert typist.wait() == 123
        assert typist.is_restored()


def test_screen_is_given_back_after_the_escape_that_disconnects(vshd: Vshd) -> None:
    with typing(vshd, "--", "sh", "-c", r"printf '\033[?2004h'; echo drawn; sleep 97") as typist:
        typist.expect(b"drawn")
        typist.type(b"\r~.")
        typist.expect(b"\x1b[0m\x1b[?2004l")
        assert typist.wait() == 123
