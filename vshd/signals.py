"""Signals for poll() to wait for: one byte in a pipe per signal.

This module uses the C module `_signal` directly. `signal` would import enum and its imports, a third of the daemon's
modules, only for names.
"""

import _signal  # type: ignore[import-not-found]  # typeshed lacks it
import os

SIGHUP: int = _signal.SIGHUP
SIGINT: int = _signal.SIGINT
SIGKILL: int = _signal.SIGKILL
SIGTERM: int = _signal.SIGTERM
SIGCHLD: int = _signal.SIGCHLD
SIGCONT: int = _signal.SIGCONT
SIGSTOP: int = _signal.SIGSTOP
SIGUSR1: int = _signal.SIGUSR1
SIGUSR2: int = _signal.SIGUSR2
SIGWINCH: int = _signal.SIGWINCH

READ_SIZE = 512


# What find_ignored() has found.
_ignored: list[int] | None = None


def find_ignored() -> list[int]:
    """Returns the signals that a new program would ignore: Python ignores SIGPIPE, vshd's parent perhaps more.

    The kernel resets signals that have a handler. vshd itself begins to ignore none, so it looks once.
    """
    global _ignored  # noqa: PLW0603 - a fact of the process
    if _ignored is None:
        _ignored = [number for number in _signal.valid_signals() if _signal.getsignal(number) == _signal.SIG_IGN]
    return _ignored


class Wakeup:
    """Invariant: `fd` is the reading end of a non-blocking pipe that the C-level handler writes signal numbers to."""

    __slots__ = ("_writing", "fd")

    def __init__(self, numbers: tuple[int, ...]) -> None:
        """Takes over `numbers` for this process. Replaces an earlier Wakeup of the process."""
        self.fd, self._writing = os.pipe()
        for fd in (self.fd, self._writing):
            os.set_blocking(fd, False)
        _signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in numbers:
            _signal.signal(number, _ignore)

    def take(self) -> bytes:
        """Returns the numbers of the signals since the last call, one byte each."""
        try:
            return os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """Closes a forked child's copies of the parent's pipe."""
        _signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._writing)


def _ignore(number: int, frame: object) -> None:
    """Does nothing: the byte in the pipe has announced the signal."""
