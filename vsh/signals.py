"""Signals that vsh forwards, as something poll() can wait for: one byte in a pipe per signal.

The C module `_signal` is used directly: `signal` would bring enum, a sixth of a short command's time, for names alone.
"""

import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIGHUP: int = _signal.SIGHUP
SIGINT: int = _signal.SIGINT
SIGQUIT: int = _signal.SIGQUIT
SIGKILL: int = _signal.SIGKILL
SIGUSR1: int = _signal.SIGUSR1
SIGUSR2: int = _signal.SIGUSR2
SIGTERM: int = _signal.SIGTERM
SIGCONT: int = _signal.SIGCONT
SIGTSTP: int = _signal.SIGTSTP
SIGWINCH: int = _signal.SIGWINCH

# What the target gets when vsh gets it; legacy mode has no word for the last two.
FORWARDED = (SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2)
READ_SIZE = 512


class Wakeup:
    """Invariant: `fd` is the reading end of a non-blocking pipe that the C-level handler writes signal numbers to."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.fd, self._writing = os.pipe()
        for fd in (self.fd, self._writing):
            os.set_blocking(fd, False)
        _signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in numbers:
            # A signal that vsh's parent had ignored (nohup, &) stays ignored.
            if _signal.getsignal(number) != _signal.SIG_IGN:
                _signal.signal(number, _ignore)
        self._numbers = numbers

    def ignore(self) -> None:
        """Ignores the signals until this process's end. The interpreter's own end restores the default handlers, and a
        signal could then kill the process although its exit status is known.
        """
        for number in self._numbers:
            _signal.signal(number, _signal.SIG_IGN)

    def forget(self) -> None:
        """Gives a forked child the signals back: its copies of the pipe are closed, and signals do what they do by
        default.
        """
        _signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._writing)
        for number in self._numbers:
            if _signal.getsignal(number) != _signal.SIG_IGN:
                _signal.signal(number, _signal.SIG_DFL if number != SIGINT else _signal.default_int_handler)

    def take(self) -> bytes:
        """Returns the numbers of the signals since the last call, one byte each."""
        try:
            return os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""


def block_all() -> set[int]:
    """Holds all signals back from this thread; returns the mask for restore_mask()."""
    before: set[int] = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
    return before


def restore_mask(before: set[int]) -> None:
    """Undoes block_all()."""
    _signal.pthread_sigmask(_signal.SIG_SETMASK, before)


def on_continue(act: "Callable[[], None]") -> None:
    """Calls `act` each time this process runs again after a stop."""
    _signal.signal(SIGCONT, lambda _number, _frame: act())


def stop_self() -> None:
    """Stops this process as its terminal would have; returns when it is continued."""
    _signal.signal(SIGTSTP, _signal.SIG_DFL)
    os.kill(os.getpid(), SIGTSTP)
    _signal.signal(SIGTSTP, _ignore)


def _ignore(number: int, frame: object) -> None:
    """Does nothing: the byte in the pipe has announced the signal."""
