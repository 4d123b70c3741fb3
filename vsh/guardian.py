"""A process that repairs something if this one is killed (SIGKILL, the OOM killer): a fork that waits on a pipe.

It has a session of its own, so that a signal to a job, a process group or a terminal does not end it.
"""

import os

from vsh import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Another name than the program's: a kill of all vsh by name must not end the guardian.
NAME = b"tty-guardian"
FEW = 256


class Guardian:
    """Invariant: it waits for as long as this process has the writing end of the pipe."""

    def __init__(self, pid: int, pipe: int) -> None:
        self._pid = pid
        self._pipe = pipe

    def stop(self) -> None:
        """Ends the guardian: the repair is no longer needed."""
        try:
            os.write(self._pipe, b"x")
        except OSError:
            # It was killed.
            pass
        os.close(self._pipe)
        try:
            os.waitpid(self._pid, 0)
        except ChildProcessError:
            # SIGCHLD was ignored when we were started: the kernel has reaped it.
            pass


def start_guardian(fd: int, restore: "Callable[[], None]") -> Guardian | None:
    """Calls `restore` in another process when this one has died before stop(). fd: the descriptor that it needs.

    Returns None when this process cannot fork.
    """
    reading, writing = os.pipe()
    # The handlers are this process's, and so is the pipe that they write to.
    before = signals.block_all()
    try:
        pid = os.fork()
        if not pid:
            _guard(reading, fd, restore)
    except OSError:
        os.close(writing)
        return None
    finally:
        os.close(reading)
        signals.restore_mask(before)
    return Guardian(pid, writing)


def _guard(pipe: int, fd: int, restore: "Callable[[], None]") -> None:
    """Waits, restores and exits; never returns. Closes all other descriptors: peers must see the parent's end."""
    try:
        os.setsid()
        _close_all_but(pipe, fd)
        _rename()
        if not os.read(pipe, 1):
            restore()
    finally:
        os._exit(0)


def _close_all_but(*kept: int) -> None:
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        numbers = list(range(FEW))
    for number in numbers:
        if number not in kept:
            try:
                os.close(number)
            except OSError:
                # The listing's own.
                pass


def _rename() -> None:
    try:
        with open("/proc/self/comm", "wb") as file:
            file.write(NAME)
    except OSError:
        pass
