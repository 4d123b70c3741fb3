"""Our processes and their ends: a session's target, its group when the client is gone, a server's children.

The target stays unreaped until the session is over, so that no other process group can get its number.
"""

import os
import select
import time

from vshd import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sized

# Between HUP and TERM, and between TERM and KILL: enough for a shell to save its history, for a server to close.
GRACE_S = (1.0, 4.0)
# The kernel does not announce the end of processes that are not our children, so we poll.
LOOK_EVERY_S = 0.02


class Exit:
    """How the target ended: with a code, or with a signal (0: none)."""

    __slots__ = ("code", "core_dumped", "signal")

    def __init__(self, code: int, signal: int = 0, core_dumped: bool = False) -> None:
        self.code = code
        self.signal = signal
        self.core_dumped = core_dumped

    def __str__(self) -> str:
        return f"signal {self.signal}" if self.signal else f"exit {self.code}"


def find_exit(pid: int) -> Exit | None:
    """Returns how `pid` ended, and leaves it unreaped; None while it runs. A stopped process has not ended."""
    status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if status is None:
        return None
    if status.si_code == os.CLD_EXITED:
        return Exit(status.si_status)
    # Legacy mode's code for a signal is its number.
    return Exit(status.si_status, status.si_status, status.si_code == os.CLD_DUMPED)


def reap(pid: int) -> None:
    """Reaps an ended target."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def reap_ended() -> "Iterator[tuple[int, int]]":
    """Reaps every child that has ended; yields its pid and wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        yield pid, status


def wait_until_none(
    children: "Sized", wakeup: signals.Wakeup, take_signals: "Callable[[], None]", timeout_s: float
) -> None:
    """Waits until `children` is empty, or timeout_s is over. take_signals removes children as they end."""
    deadline_s = time.monotonic() + timeout_s
    poll = select.poll()
    poll.register(wakeup.fd, select.POLLIN)
    while len(children) and time.monotonic() < deadline_s:
        poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000 + 1)
        take_signals()


def signal_target(pid: int, number: int, terminal: int) -> None:
    """Signals the target's process group, and (terminal >= 0) the terminal's foreground group when it is another."""
    _kill_group(pid, number)
    if terminal < 0:
        return
    try:
        foreground = os.tcgetpgrp(terminal)
    except OSError:
        return
    if foreground > 1 and foreground != pid:
        _kill_group(foreground, number)


def end_session(pid: int, *, has_terminal: bool) -> None:
    """Ends the processes that the client left behind: HUP, TERM, KILL. Waits for them within the grace times.

    With a terminal, its closing was the HUP. A background process that ignores it on purpose (nohup) lives on, as after
    every lost terminal. Only the target's own group gets the other signals.
    """
    if not has_terminal:
        _kill_group(pid, signals.SIGHUP)
    for grace_s, number in zip(GRACE_S, (signals.SIGTERM, signals.SIGKILL), strict=True):
        deadline = time.monotonic() + grace_s
        while _find_running(pid, has_terminal):
            if time.monotonic() >= deadline:
                _kill_all(_find_running(pid, has_terminal), number)
                break
            time.sleep(LOOK_EVERY_S)
        else:
            return


def kill_session(pid: int) -> None:
    """Kills at once the processes that a session's process left behind when it died itself."""
    _kill_all(_find_running(pid, False), signals.SIGKILL)


def _find_running(pid: int, only_group: bool) -> list[int]:
    """Returns the processes of session `pid`, or only of its first group, that are not dead yet."""
    running = []
    try:
        entries = os.listdir("/proc")
    except OSError:
        # Another root may have none.
        return []
    for entry in entries:
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The command's name may hold blanks and parentheses; the fields after the last one are fixed (proc(5)).
                state, _parent, group, session = file.read(1024).rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(group if only_group else session) == pid and state not in (b"Z", b"X"):
            running.append(int(entry))
    return running


def _kill_all(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
            # A stopped process takes a TERM only once it runs again.
            os.kill(pid, signals.SIGCONT)
        except (ProcessLookupError, PermissionError):
            pass


def _kill_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass
