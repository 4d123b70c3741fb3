"""How `up` and a machine's monitor meet: one socketpair, the plan one way, reports the other.

The monitor is started first of all, so that its interpreter loads while `up` still chooses and builds; it waits for a
plan and ends without a trace when none comes. The plan travels as a length and JSON, with the descriptors the monitor
shall own (the machine's lock, the vhost device) attached to its first byte (SCM_RIGHTS).
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from vmkit.errors import MachineError
from vmkit.machine.launch import MAX_PLAN_BYTES, LaunchPlan, Layout, parse_launch_plan

# A monitor that was told to stop ends QEMU within TERM and KILL deadlines.
ABORT_DEADLINE_S = 15.0
LENGTH_BYTES = 4
MAX_FDS = 2
MAX_LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Monitor:
    """A monitor process and our end of its socket."""

    process: "subprocess.Popen[bytes]"
    reports: socket.socket
    early_log: IO[bytes]

    def launch(self, plan: LaunchPlan, lock_fd: int, vhost_fd: int | None) -> None:
        """Gives it a machine to own. Raises MachineError when it is gone."""
        text = plan.render().encode()
        fds = [lock_fd] if vhost_fd is None else [lock_fd, vhost_fd]
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
        """The last it said, wherever it said it: before it had a plan, in the machine's directory, in the evidence."""
        self.early_log.seek(0)
        text = self.early_log.read(MAX_LOG_TAIL_BYTES).decode(errors="replace")
        for folder in (plan.directory, plan.evidence):
            with contextlib.suppress(OSError):
                text += (folder / Layout.MONITOR_LOG).read_text(errors="replace")[-MAX_LOG_TAIL_BYTES:]
        return text


@contextlib.contextmanager
def start_monitor() -> Iterator[Monitor]:
    """A monitor that waits for its plan. Leaving the block by an exception ends it; otherwise it goes on alone."""
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as log:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vmkit.machine.monitor", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # A Ctrl-C in the terminal of `up` must not reach it, nor the hang-up when that terminal closes.
                start_new_session=True,
                cwd="/",
            )
        monitor = Monitor(process, ours, log)
        with monitor.ended_on_error():
            yield monitor


@dataclass(frozen=True, slots=True)
class Received:
    """What the monitor's side of the meeting brings; lock_fd is only kept open."""

    plan: LaunchPlan
    reports: socket.socket
    lock_fd: int
    vhost_fd: int | None


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
    return Received(parse_launch_plan(text.decode()), reports, fds[0], fds[1] if len(fds) > 1 else None)


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
    """Tells the monitor by closing its socket, and sees it gone; a second Ctrl-C does not cut this short."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        reports.close()
        try:
            process.wait(ABORT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            # QEMU and the device die with it (PR_SET_PDEATHSIG).
            process.kill()
            process.wait()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
