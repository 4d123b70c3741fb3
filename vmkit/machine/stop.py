"""Ends a machine: asks the guest, then QEMU, then sends SIGKILL, each with a deadline. Waits for an end, and why."""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vmkit.errors import MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.registry import sweep
from vmkit.machine.words import (
    MAX_ANSWER_LINE_BYTES,
    Answer,
    Ended,
    ExpectEnd,
    Quit,
    Rebooted,
    Request,
    Resume,
    Watch,
    parse_answer,
    render_request,
)
from vsh.address import Address, address_of
from vsh.client import Client
from vsh.errors import VshError
from vsh.power_off import ask_to_power_off
from vsh.registry import Entry, find_machine

# A guest under TCG on a busy host needs seconds to stop its processes.
POWER_OFF_DEADLINE_S = 20.0
# systemd stops services first, each within its own time.
SYSTEMD_DEADLINE_S = 90.0
ASK_DEADLINE_S = 5.0
QUIT_DEADLINE_S = 10.0
KILL_DEADLINE_S = 10.0
# A monitor that has sent its end still removes the machine's directory.
MONITOR_GRACE_S = 5.0
# One that does not answer is ending on its own, or has not begun to listen, or hangs.
NO_ANSWER_GRACE_S = 1.0


class Control:
    """A connection to a machine's monitor. Invariant: `_ended` is the machine's end as soon as it was received."""

    def __init__(self, sock: socket.socket, on_reboot: Callable[[], None] | None = None) -> None:
        """on_reboot: called when the guest boots again."""
        self._sock = sock
        self._on_reboot = on_reboot
        self._buffer = b""
        self._ended: Ended | None = None

    def ask(self, request: Request, timeout_s: float = ASK_DEADLINE_S) -> Answer:
        """Sends one request and returns its answer; a monitor that is ending already answers with a refusal."""
        with contextlib.suppress(OSError):
            self._sock.sendall(render_request(request))
        answer = self._receive(timeout_s, wants_answer=True)
        if isinstance(answer, Answer):
            return answer
        return Answer(False, "the machine has ended" if answer is not None else "the monitor does not answer")

    def wait_end(self, timeout_s: float | None) -> Ended | None:
        """The machine's end, or None when the deadline comes first."""
        self._receive(timeout_s, wants_answer=False)
        return self._ended

    def _receive(self, timeout_s: float | None, *, wants_answer: bool) -> Answer | Ended | None:
        """The next answer, if one is wanted, else the end; None when the deadline comes first."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while self._ended is None:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                found = parse_answer(line)
                if isinstance(found, Ended):
                    self._ended = found
                elif isinstance(found, Rebooted):
                    if self._on_reboot is not None:
                        self._on_reboot()
                elif found is not None and wants_answer:
                    return found
                continue
            self._sock.settimeout(None if deadline_s is None else max(0.001, deadline_s - time.monotonic()))
            try:
                data = self._sock.recv(MAX_ANSWER_LINE_BYTES)
            except TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                # A monitor that was killed sends nothing more.
                self._ended = Ended("monitor-gone", "the monitor is gone", expected=False)
            self._buffer = (self._buffer + data)[-MAX_ANSWER_LINE_BYTES:]
        return self._ended


@contextlib.contextmanager
def open_control(entry: Entry, on_reboot: Callable[[], None] | None = None) -> Iterator[Control]:
    """A connection to the monitor of a machine. Raises MachineError when the monitor does not answer."""
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
        yield Control(sock, on_reboot)


def wait_for_end(entry: Entry, timeout_s: float | None, on_reboot: Callable[[], None] | None = None) -> Ended | None:
    """Blocks until a machine ends; None when the deadline comes first. on_reboot: called at each reboot."""
    with open_control(entry, on_reboot) as control:
        control.ask(Watch())
        return control.wait_end(timeout_s)


def power_off(entry: Entry, *, timeout_s: float | None = None, tell: Callable[[str], None] | None = None) -> None:
    """Asks the guest to power off, as `down` does. Ends QEMU when the guest still runs after timeout_s seconds.

    timeout_s: None is 20, or 90 where systemd is pid 1.

    A guest that is not ready cannot be asked: the monitor cancels its start. One that waits in a pool has nothing to
    save.
    """
    if entry.state in ("starting", "pooled"):
        kill(entry)
        return
    say = tell or (lambda _text: None)
    if timeout_s is None:
        timeout_s = SYSTEMD_DEADLINE_S if entry.record.get("init") else POWER_OFF_DEADLINE_S
    with _open_monitor(entry) as monitor:
        grace_s = NO_ANSWER_GRACE_S
        with contextlib.suppress(MachineError), open_control(entry) as control:
            grace_s = MONITOR_GRACE_S
            if not _power_off_guest(entry, control, timeout_s, say):
                say(f"the guest did not power off within {timeout_s:g} s: ending QEMU")
                control.ask(Quit(by="down"))
                control.wait_end(QUIT_DEADLINE_S)
        _end_monitor(monitor, grace_s)
    _await_gone(entry)


def begin_kill(entry: Entry) -> None:
    """Tells the monitor to end the machine, and waits for nothing. kill() waits, and makes sure."""
    with contextlib.suppress(MachineError), open_control(entry) as control:
        control.ask(Quit(by="kill"))


def kill(entry: Entry) -> None:
    """Ends a machine without asking the guest: QEMU is a child of the monitor and dies with it."""
    with _open_monitor(entry) as monitor:
        grace_s = NO_ANSWER_GRACE_S
        with contextlib.suppress(MachineError), open_control(entry) as control:
            grace_s = MONITOR_GRACE_S
            control.ask(Quit(by="kill"))
            control.wait_end(KILL_DEADLINE_S)
        _end_monitor(monitor, grace_s)
    _await_gone(entry)


def _power_off_guest(entry: Entry, control: Control, timeout_s: float, say: Callable[[str], None]) -> bool:
    """True when the machine has ended in time. Another `down` may have asked the guest already."""
    end_s = time.monotonic() + timeout_s
    if entry.state == "paused":
        control.ask(Resume(), timeout_s)
        entry = find_machine(name=entry.name) or entry
    address = _find_address(entry)
    control.ask(ExpectEnd())
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
    """Asks vshd, and where it knows no such request, runs `poweroff`, which busybox and systemd both have.

    The guest may be gone before it can answer: that is what was asked for.
    """
    end_s = time.monotonic() + timeout_s
    with contextlib.suppress(VshError, OSError):
        ask_to_power_off(address, timeout_s=timeout_s)
        return
    left_s = max(1.0, end_s - time.monotonic())
    with contextlib.suppress(VshError, OSError):
        Client(address, timeout_s=left_s).run(["poweroff"], timeout=left_s)


def _await_gone(entry: Entry) -> None:
    """Removes what a killed monitor has left. An `up` that was interrupted holds its entry a moment longer."""
    deadline_s = time.monotonic() + KILL_DEADLINE_S
    while True:
        sweep()
        if not _is_there(entry):
            return
        if time.monotonic() > deadline_s:
            raise MachineError(f"'{entry.name}' does not end", hint=f"its monitor is process {entry.pid}")
        # There is no descriptor to wait on for another process's lock; the end itself has arrived already.
        time.sleep(0.01)
