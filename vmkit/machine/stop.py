"""Ending a machine:

Ask the guest, then QEMU, then SIGKILL, each with a deadline. Also: waiting for an end and hearing why.
"""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.registry import sweep
from vsh.address import Address, address_of
from vsh.client import Client
from vsh.errors import VshError
from vsh.registry import Machine as Entry

# A guest under TCG on a busy host needs seconds to stop its processes.
POWER_OFF_DEADLINE_S = 20.0
ASK_DEADLINE_S = 5.0
QUIT_DEADLINE_S = 10.0
KILL_DEADLINE_S = 10.0
MAX_LINE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Ended:
    """What the monitor said last."""

    reason: str
    brief: str
    expected: bool


class Control:
    """A connection to a machine's monitor."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = b""

    def ask(self, verb: str) -> None:
        """Sends one verb; a monitor that is ending already is not an error."""
        with contextlib.suppress(OSError):
            self._sock.sendall(json.dumps({"do": verb}).encode() + b"\n")

    def wait_end(self, timeout_s: float | None) -> Ended | None:
        """The machine's end, or None when the deadline comes first."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                ended = _parse_end(line)
                if ended is not None:
                    return ended
                continue
            self._sock.settimeout(None if deadline_s is None else max(0.001, deadline_s - time.monotonic()))
            try:
                data = self._sock.recv(MAX_LINE_BYTES)
            except TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                # A monitor that was killed says nothing more.
                return Ended("monitor-gone", "the monitor is gone", expected=False)
            self._buffer = (self._buffer + data)[-MAX_LINE_BYTES:]


@contextlib.contextmanager
def open_control(entry: Entry) -> Iterator[Control]:
    """A connection to the monitor of a machine. Raises MachineError when nobody answers there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        try:
            sock.settimeout(ASK_DEADLINE_S)
            sock.connect(str(Path(entry.directory) / Layout.CONTROL))
        except OSError as error:
            raise MachineError(
                f"the monitor of '{entry.name}' does not answer: {error.strerror or error}",
                hint=f"vmkit kill {entry.name} ends it without asking",
            ) from error
        yield Control(sock)


def wait_for_end(entry: Entry, timeout_s: float | None) -> Ended | None:
    """Blocks until a machine ends; None when the deadline comes first."""
    with open_control(entry) as control:
        control.ask("watch")
        return control.wait_end(timeout_s)


def power_off(
    entry: Entry, *, timeout_s: float = POWER_OFF_DEADLINE_S, tell: Callable[[str], None] | None = None
) -> None:
    """`down`: the guest is asked to power off; when it does not within timeout_s seconds, QEMU is ended."""
    say = tell or (lambda _text: None)
    try:
        address = _find_address(entry)
        with open_control(entry) as control:
            control.ask("stopping")
            if address is not None:
                say("asking the guest to power off")
                _ask_guest(address)
            if control.wait_end(timeout_s) is None:
                say(f"the guest did not power off within {timeout_s:g} s: ending QEMU")
                control.ask("quit")
                if control.wait_end(QUIT_DEADLINE_S) is None:
                    kill(entry)
    except MachineError:
        kill(entry)
    _await_gone(entry)


def kill(entry: Entry) -> None:
    """Ends a machine without asking the guest: QEMU is a child of the monitor and dies with it."""
    try:
        with open_control(entry) as control:
            control.ask("kill")
            if control.wait_end(KILL_DEADLINE_S) is not None:
                _await_gone(entry)
                return
    except MachineError:
        pass
    # The entry is live, so its lock is held, so this pid is the monitor's and nobody else's.
    with contextlib.suppress(ProcessLookupError):
        os.kill(entry.pid, signal.SIGKILL)
    _await_gone(entry)


def _find_address(entry: Entry) -> Address | None:
    """How to reach the guest; None while it is not ready, when there is nobody to ask."""
    try:
        return address_of(entry)
    except VshError:
        return None


def _ask_guest(address: Address) -> None:
    """Runs `poweroff`, which busybox and systemd both have.

    The guest may be gone before it can answer: that is what was asked for.
    """
    with contextlib.suppress(VshError, OSError):
        Client.connect(address, timeout_s=ASK_DEADLINE_S).run(["poweroff"], timeout_s=ASK_DEADLINE_S)


def _await_gone(entry: Entry) -> None:
    """Waits for the monitor to let go of its lock, then removes what a killed one has left."""
    deadline_s = time.monotonic() + KILL_DEADLINE_S
    while Path(entry.directory).exists():
        sweep()
        if time.monotonic() > deadline_s:
            raise MachineError(f"'{entry.name}' does not end", hint=f"its monitor is process {entry.pid}")
        # There is no descriptor to wait on for another process's lock; the end itself has been heard already.
        time.sleep(0.01)


def _parse_end(line: bytes) -> Ended | None:
    try:
        value = json.loads(line)
        return Ended(str(value["end"]), str(value["brief"]), bool(value["expected"]))
    except (ValueError, KeyError, TypeError):
        return None
