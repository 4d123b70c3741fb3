"""Connects `up` with a machine's monitor by one socketpair: `up` sends the plan, the monitor sends reports.

The monitor is started first of all, so that its interpreter loads while `up` still chooses and builds; it waits for a
plan and ends without a trace when none comes. The plan travels as a length and JSON, with the descriptors the monitor
gets (the machine's locks, the vhost device, a pidfd of the owner) attached to its first byte (SCM_RIGHTS).
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vmkit.errors import HostError, MachineError
from vmkit.machine.launch import MAX_PLAN_BYTES, LaunchPlan, Layout, parse_launch_plan
from vmkit.machine.programs import start_program

# A monitor that was told to stop ends QEMU within TERM and KILL deadlines.
ABORT_DEADLINE_S = 15.0
# A monitor takes its plan as soon as its interpreter is up.
LAUNCH_DEADLINE_S = 30.0
LENGTH_BYTES = 4
MAX_FDS = 4
MAX_LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class MonitorHandle:
    """A monitor process and our end of its socket."""

    process: "subprocess.Popen[bytes]"
    reports: socket.socket
    early_log: BinaryIO

    def launch(self, plan: LaunchPlan, lock_fd: int, vhost_fd: int | None, stored_fd: int | None = None) -> None:
        """Gives it a machine to own, which ends with this process where the plan says so.

        stored_fd: the lock of a stored machine's folder, where the plan says that it is one.

        Raises MachineError when the monitor is gone or does not listen, HostError where a process cannot be watched.
        """
        with contextlib.ExitStack() as stack:
            fds = [fd for fd in (lock_fd, vhost_fd, stored_fd) if fd is not None]
            if plan.is_owned:
                fds.append(_open_own_pidfd())
                stack.callback(os.close, fds[-1])
            self._send(plan, fds)

    def _send(self, plan: LaunchPlan, fds: list[int]) -> None:
        text = plan.render().encode()
        self.reports.settimeout(LAUNCH_DEADLINE_S)
        try:
            socket.send_fds(self.reports, [len(text).to_bytes(LENGTH_BYTES, "little")], fds)
            self.reports.sendall(text)
        except OSError as error:
            raise MachineError("the monitor of the machine did not start", details=self.read_log(plan)) from error

    @contextlib.contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """A block that, left by an exception, leaves no monitor behind, and so no QEMU."""
        try:
            yield
        except BaseException:
            _abort(self.process, self.reports)
            raise

    def read_log(self, plan: LaunchPlan) -> str:
        """The last lines it printed, before it had a plan and after. (The evidence may be an earlier machine's.)"""
        text = _read_tail(self.early_log.fileno())
        with contextlib.suppress(OSError), (plan.directory / Layout.MONITOR_LOG).open("rb") as file:
            text += _read_tail(file.fileno())
        return text


def _open_own_pidfd() -> int:
    """A descriptor that becomes readable when this process ends: no child inherits that, as it would a pipe's end."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise HostError(
            f"this kernel cannot watch a process: pidfd_open: {error.strerror}",
            hint="Linux 5.3 can; Machine.start() without a with-block does not need it",
        ) from error


def _read_tail(fd: int) -> str:
    """Without moving the descriptor's offset, which is the writer's, too."""
    start = max(0, os.fstat(fd).st_size - MAX_LOG_TAIL_BYTES)
    return os.pread(fd, MAX_LOG_TAIL_BYTES, start).decode(errors="replace")


@contextlib.contextmanager
def start_monitor() -> Iterator[MonitorHandle]:
    """A monitor that waits for its plan. Leaving the block by an exception ends it; otherwise it goes on alone."""
    ours, theirs = socket.socketpair()
    with ours, open(os.memfd_create("monitor-log"), "r+b") as log:  # noqa: PTH123  (it has no path)
        with theirs:
            process = start_program("vmkit.monitor", theirs, log)
        monitor = MonitorHandle(process, ours, log)
        with monitor.ended_on_error():
            yield monitor


@dataclass(frozen=True, slots=True)
class Received:
    """What the monitor's side of the meeting brings; lock_fd and stored_fd are only kept open. owner_fd: a pidfd."""

    plan: LaunchPlan
    reports: socket.socket
    lock_fd: int
    vhost_fd: int | None
    owner_fd: int | None
    stored_fd: int | None = None


def receive_plan(fd: int) -> Received | None:
    """The monitor's side: waits for a plan on the socket; None when `up` went away without one."""
    reports = socket.socket(fileno=fd)
    # However long `up` builds: its end closes when it dies.
    head, fds, _, _ = socket.recv_fds(reports, LENGTH_BYTES, MAX_FDS)
    head += _read_exactly(reports, LENGTH_BYTES - len(head)) if head else b""
    size = int.from_bytes(head, "little")
    text = _read_exactly(reports, size) if 0 < size <= MAX_PLAN_BYTES else b""
    if len(head) < LENGTH_BYTES or not text or not fds:
        return None
    for passed in fds:
        os.set_inheritable(passed, False)
    plan = parse_launch_plan(text.decode())
    lock_fd, *rest = fds
    owner_fd = rest.pop() if plan.is_owned else None
    stored_fd = rest.pop() if plan.is_stored else None
    return Received(plan, reports, lock_fd, rest[0] if rest else None, owner_fd, stored_fd)


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    """size bytes, or nothing when the peer closes before them."""
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data


def _abort(process: "subprocess.Popen[bytes]", reports: socket.socket) -> None:
    """Tells the monitor to end, and sees it gone; a second Ctrl-C does not cut this short."""
    with _uninterrupted():
        reports.close()
        # It has most often seen our end close by then; not so when it was just about to be let go.
        process.terminate()
        try:
            process.wait(ABORT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            # QEMU and the device die with it (PR_SET_PDEATHSIG).
            process.kill()
            process.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A block that SIGINT, SIGTERM and SIGHUP do not leave: an exception is under way already.

    By handlers, not by a mask: a mask is a thread's own, and a progress bar has a thread that would take the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python interrupts the main thread only.
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
