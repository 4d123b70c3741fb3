"""Every program of ours, started as a careless parent starts it: with signals ignored and blocked."""

import ast
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Vshd, ended, wait_until
from tests.vshd.test_init import needs_namespace

# What a service manager or a CI agent may leave to its children, at its worst; then the program.
CARELESS = """
import os, signal, sys
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
# Python's own.
OF_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}
# A person's word for what a person starts: nohup, &, trap.
OF_PEOPLE = {
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    *(signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
}


def careless(argv: list[str]) -> list[str]:
    return [sys.executable, "-c", CARELESS, *argv]


def module(name: str, *words: str) -> list[str]:
    return [sys.executable, "-m", name, *words]


def read_signals(status: str, field: str) -> set[int]:
    """SigBlk or SigIgn of a process's status (proc(5)), as numbers.

    Without 32 and 33, which are glibc's own: its posix_spawn() ignores them for every child.
    """
    mask = int(status.partition(f"{field}:")[2].split()[0], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1} - {32, 33}


@contextlib.contextmanager
def start(argv: list[str], **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    options.setdefault("env", ENVIRONMENT)
    for stream in ("stdin", "stdout", "stderr"):
        options.setdefault(stream, subprocess.PIPE)
    with ended(subprocess.Popen(careless(argv), **options)) as process:
        yield process


@contextlib.contextmanager
def with_socket(name: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A program that waits for a plan or a request on a socket."""
    ours, theirs = socket.socketpair()
    with ours, theirs, start(module(name, str(theirs.fileno())), pass_fds=[theirs.fileno()]) as process:
        yield process


@contextlib.contextmanager
def client(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    server = Vshd(folder)
    with start(module("vsh", *server.where, "--", "sleep", "60")) as process:
        wait_until(server.children, "the session runs")
        yield process
    assert server.stop() == 0


@contextlib.contextmanager
def device(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    words = ("--guest-cid", "3", "--socket", str(folder / "vhost"), "--uds-path", str(folder / "v"))
    with start(module("vmkit.vsock", *words)) as process:
        wait_until((folder / "vhost").exists, "it has made its sockets")
        yield process


PROGRAMS: dict[str, tuple[Callable[[Path], Any], set[signal.Signals]]] = {
    "vshd": (lambda folder: start(module("vshd", f"--listen=unix:{folder}/s", "--log_stderr")), {signal.SIGHUP}),
    "vsh": (client, OF_PEOPLE),
    "the monitor": (lambda _: with_socket("vmkit.monitor"), set()),
    "the device": (device, set()),
    "the daemon of a forward": (lambda _: with_socket("vmkit.forward.daemon"), set()),
    "the daemon of a share": (lambda _: with_socket("vmkit.shares.daemon"), set()),
    "the leash": (lambda _: start(module("vmkit.docker", "--", "sleep", "60")), set()),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_has_its_own_signals(name: str, tmp_path: Path) -> None:
    begin, kept = PROGRAMS[name]
    with begin(tmp_path) as process:
        place = Path(f"/proc/{process.pid}")
        wait_until(lambda: (place / "cmdline").read_bytes().split(b"\0")[1:2] == [b"-m"], f"{name} is executed")
        status = place / "status"
        wait_until(lambda: not read_signals(status.read_text(), "SigBlk"), f"{name} blocks no signal", 5)
        assert read_signals(status.read_text(), "SigIgn") <= OF_PYTHON | kept


def test_command_in_a_guest_has_the_signals_of_a_new_session(tmp_path: Path) -> None:
    server = Vshd(tmp_path, wrapper=(sys.executable, "-c", CARELESS))
    text = server.run("--", "cat", "/proc/self/status").stdout.decode()
    assert (read_signals(text, "SigBlk"), read_signals(text, "SigIgn")) == (set(), set())
    assert server.stop() == 0


@needs_namespace
def test_command_of_a_namespace_has_its_signals_as_they_came(tmp_path: Path) -> None:
    """nohup is for the command; SIGPIPE and what blocks are not."""
    (tmp_path / "run").mkdir(mode=0o700)
    argv = module("vmkit", "forward", "--ipv6", "--", "cat", "/proc/self/status")
    environment = {**ENVIRONMENT, "VMKIT_RUNTIME_DIR": str(tmp_path / "run")}
    with start(argv, env=environment) as process:
        output, _ = process.communicate(timeout=DEADLINE_S)
    text = output.decode()
    assert (read_signals(text, "SigBlk"), read_signals(text, "SigIgn")) == (set(), OF_PEOPLE)


def test_tool_that_fails_is_a_failure_where_nobody_waits_for_children(tmp_path: Path) -> None:
    fake = tmp_path / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho QEMU emulator version 9.0.0\nexit 7\n")
    fake.chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "VMKIT_CACHE_DIR": str(tmp_path / "cache"),
    }
    with start(module("vmkit", "doctor"), env=environment) as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert b"failed with status 7" in output + errors


def test_forwards_beside_a_command_end_well_where_nobody_waits_for_children(tmp_path: Path) -> None:
    server = Vshd(tmp_path)
    with start(module("vsh", *server.where, "-L", "0:localhost:1", "--", "true")) as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, b"error" in errors) == (0, False), errors
    assert server.stop() == 0


# They read a job from stdin, start no child, answer and end: vmkit.run owns their lives and ends them with SIGKILL.
ANSWERS_AND_ENDS = {"vmkit/image/imports.py", "vmkit/image/recipe/sandbox.py"}


def test_every_program_begins_with_its_signals() -> None:
    """Each program that is started by name or by `python -m`."""
    begun = set()
    for path in sorted(CHECKOUT.glob("v*/**/*.py")):
        text = path.read_text()
        if 'if __name__ == "__main__"' not in text or str(path.relative_to(CHECKOUT)) in ANSWERS_AND_ENDS:
            continue
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
        assert "settle_signals" in calls, path
        begun.add(str(path.relative_to(CHECKOUT)))
    assert begun >= {"vmkit/__main__.py", "vsh/__main__.py", "vshd/__main__.py"}
