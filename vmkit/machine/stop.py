"""Ending a machine:

Ask the guest, then QEMU, then SIGKILL, each with a deadline. Also: waiting for an end and hearing why.
"""

import contextlib
import json
import os
import select
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
from vsh.registry import Entry, find_machine

# A guest under TCG on a busy host needs seconds to stop its processes.
POWER_OFF_DEADLINE_S = 20.0
ASK_DEADLINE_S = 5.0
QUIT_DEADLINE_S = 10.0
KILL_DEADLINE_S = 10.0
# A monitor that has told its end still removes the machine's directory.
MONITOR_GRACE_S = 5.0
# One that does not answer is ending on its own, or has not begun to listen, or hangs.
NO_ANSWER_GRACE_S = 1.0
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
    """`down`: the guest is asked to power off; when it does not within timeout_s seconds, QEMU is ended.

    A guest that is not ready has nobody who could be asked: its start is called off.
    """
    if entry.state == "starting":
        kill(entry)
        return
    say = tell or (lambda _text: None)
    with _open_monitor(entry) as monitor:
        grace_s = NO_ANSWER_GRACE_S
        with contextlib.suppress(MachineError), open_control(entry) as control:
            grace_s = MONITOR_GRACE_S
            if not _power_off_guest(entry, control, timeout_s, say):
                say(f"the guest did not power off within {timeout_s:g} s: ending QEMU")
                control.ask("quit")
                control.wait_end(QUIT_DEADLINE_S)
        _end_monitor(monitor, grace_s)
    _await_gone(entry)


def kill(entry: Entry) -> None:
    """Ends a machine without asking the guest: QEMU is a child of the monitor and dies with it."""
    with _open_monitor(entry) as monitor:
        grace_s = NO_ANSWER_GRACE_S
        with contextlib.suppress(MachineError), open_control(entry) as control:
            grace_s = MONITOR_GRACE_S
            control.ask("kill")
            control.wait_end(KILL_DEADLINE_S)
        _end_monitor(monitor, grace_s)
    _await_gone(entry)


def _power_off_guest(entry: Entry, control: Control, timeout_s: float, say: Callable[[str], None]) -> bool:
    """True when the machine has ended in time. Another `down` may have asked the guest already."""
    end_s = time.monotonic() + timeout_s
    address = _find_address(entry)
    control.ask("stopping")
    if address is not None:
        # All the time there is: a slow guest needs more than seconds to start a session.
        _ask_guest(address, timeout_s)
    return control.wait_end(max(0.0, end_s - time.monotonic())) is not None


@contextlib.contextmanager
def _open_monitor(entry: Entry) -> Iterator[int | None]:
    """A pidfd of the machine's monitor, None when the machine has ended.

    Between reading a record and now its monitor may have ended, and its number be another process's: so the record is
    read again when the descriptor is open. While the lock is held the number is the monitor's.
    """
    try:
        fd = os.pidfd_open(entry.pid) if entry.pid > 0 else None
    except OSError:
        fd = None
    try:
        yield fd if fd is not None and _is_there(entry) else None
    finally:
        if fd is not None:
            os.close(fd)


def _end_monitor(monitor: int | None, grace_s: float) -> None:
    """Waits for a monitor that is ending; one that does not is killed."""
    if monitor is None or _is_over(monitor, grace_s):
        return
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(monitor, signal.SIGKILL)
    _is_over(monitor, KILL_DEADLINE_S)


def _is_over(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _is_there(entry: Entry) -> bool:
    """True while this very machine is registered, and not a later one of its name."""
    now = find_machine(name=entry.name)
    return now is not None and now.pid == entry.pid


def _find_address(entry: Entry) -> Address | None:
    """How to reach the guest; None while it is stopping already."""
    try:
        return address_of(entry)
    except VshError:
        return None


def _ask_guest(address: Address, timeout_s: float) -> None:
    """Runs `poweroff`, which busybox and systemd both have.

    The guest may be gone before it can answer: that is what was asked for.
    """
    with contextlib.suppress(VshError, OSError):
        Client(address, timeout_s=timeout_s).run(["poweroff"], timeout=timeout_s)


def _await_gone(entry: Entry) -> None:
    """Removes what a killed monitor has left. An `up` that was interrupted holds its entry a moment longer."""
    deadline_s = time.monotonic() + KILL_DEADLINE_S
    while True:
        sweep()
        if not _is_there(entry):
            return
        if time.monotonic() > deadline_s:
            raise MachineError(f"'{entry.name}' does not end", hint=f"its monitor is process {entry.pid}")
        # There is no descriptor to wait on for another process's lock; the end itself has been heard already.
        time.sleep(0.01)


def _parse_end(line: bytes) -> Ended | None:
    try:
        value = json.loads(line)
        return Ended(str(value["end"]), str(value["brief"]), bool(value["expected"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
