"""Echoes of a terminal of this host's, made as the race's clients make the guest's."""

import sys

import pytest

from vmkit.bench.programs import Running
from vmkit.bench.terminal import ECHOING, await_echoing, time_echoes
from vmkit.errors import HostError

# A shell behind a terminal whose modes are all off, between two pipes: what ssh asks for behind a ControlMaster when
# its stdin is no terminal.
CLIENT = """
import os, pty, select, sys, termios
master, slave = pty.openpty()
modes = termios.tcgetattr(slave)
termios.tcsetattr(slave, termios.TCSANOW, [0, 0, modes[2], 0, *modes[4:]])
if os.fork() == 0:
    os.login_tty(slave)
    os.execvp("sh", ["sh", "-c", sys.argv[1]])
os.close(slave)
while True:
    for fd in select.select([0, master], [], [])[0]:
        data = os.read(fd, 4096)
        if not data:
            sys.exit()
        os.write(master if fd == 0 else 1, data)
"""


def client(command: str) -> Running:
    return Running([sys.executable, "-I", "-S", "-c", CLIENT, command])


def test_echoes_come_whatever_terminal_a_client_has_asked_for() -> None:
    with client(ECHOING) as program:
        await_echoing(program)
        # Again and again: a round leaves nothing for the next to read.
        assert all(0 < time_echoes(program) < 1 for _ in range(3))


def test_terminal_that_ends_is_told() -> None:
    with client("exit") as program, pytest.raises(HostError, match="has ended"):
        await_echoing(program)
