"""Signals as something poll() can wait for: one byte in a pipe per signal.

The C module `_signal` is used directly: `signal` would bring enum and what enum needs, a third of the daemon's modules,
for names alone.
"""

import _signal  # type: ignore[import-not-found]
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

READ_SIZE = 512


def find_ignored() -> list[int]:
    """The signals that a new program would ignore: SIGPIPE by Python's doing, more by whoever started vshd.

    Signals with a handler are reset by the kernel.
    """
    return [number for number in _signal.valid_signals() if _signal.getsignal(number) == _signal.SIG_IGN]


class Wakeup:
    """Invariant: `fd` is the reading end of a non-blocking pipe that the C-level handler writes signal numbers to."""

    __slots__ = ("_writing", "fd")

    def __init__(self, numbers: tuple[int, ...]) -> None:
        """Takes `numbers` over for this process, and everything that came before."""
        self.fd, self._writing = os.pipe()
        for fd in (self.fd, self._writing):
            os.set_blocking(fd, False)
        _signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in numbers:
            _signal.signal(number, _ignore)

    def take(self) -> bytes:
        """The numbers of the signals since the last call, one byte each."""
        try:
            return os.read(self.fd, READ_SIZE)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        """For a forked child: lets go of the parent's pipe."""
        _signal.set_wakeup_fd(-1)
        os.close(self.fd)
        os.close(self._writing)


def _ignore(number: int, frame: object) -> None:
    """The pipe has said it already."""
