"""The local terminal: its size, raw mode, and its restoration after every kind of end.

This process restores it on every exit that it can see. When it is killed, a guardian (vsh.guardian) does.
"""

import atexit
import struct
import termios
import time
from fcntl import ioctl

from vsh import signals
from vsh.ledger import Ledger
from vsh.stdio import HELD_LOOK_S, is_background

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.guardian import Guardian

WINDOW_SIZE_BYTES = 8
# What ends sooner pays for no guardian: it costs about 2 ms. Until then the next client mends what a killed one left.
GUARD_AFTER_S = 0.5


def find_size() -> tuple[int, int]:
    """Returns rows and columns of the terminal among stdin, stdout, stderr; (0, 0) when none is a terminal."""
    return find_window()[:2]


def find_window() -> tuple[int, int, int, int]:
    """As find_size(), and width and height in pixels; 0 for a terminal that does not know them."""
    for fd in (0, 1, 2):
        try:
            rows, cols, width, height = struct.unpack("HHHH", ioctl(fd, termios.TIOCGWINSZ, bytes(WINDOW_SIZE_BYTES)))
        except OSError:
            continue
        if rows and cols:
            return rows, cols, width, height
    return 0, 0, 0, 0


class RawTerminal:
    """A terminal that is raw between enter() and leave(), for as long as its foreground job is ours."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ledger = Ledger(fd)
        self._guardian: Guardian | None = None
        self._is_wanted = False
        # No other job has had the terminal since we made it raw.
        self._is_current = False
        self._guard_at_s: float | None = None
        atexit.register(self.leave)

    def enter(self) -> bool:
        """Makes the terminal raw, and keeps typed-ahead input. Call it again before each read, and after `look_s`.

        False while the terminal belongs to another job: it stays unchanged, and must not be read.
        """
        if not self._is_wanted:
            self._is_wanted = True
            signals.on_continue(self._look_again)
        if is_background(self._fd):
            self._is_current = False
            return False
        if not self._is_current:
            self._is_current = True
            if self._ledger.enter() and self._guardian is None:
                self._guard_at_s = time.monotonic() + GUARD_AFTER_S
        if self._guard_at_s is not None and time.monotonic() >= self._guard_at_s:
            self._start_guardian()
        return True

    @property
    def look_s(self) -> float | None:
        """In how many seconds enter() must be called again; None: not before the next read."""
        if self._is_wanted and not self._is_current:
            return HELD_LOOK_S
        return None if self._guard_at_s is None else max(0.0, self._guard_at_s - time.monotonic())

    def leave(self) -> None:
        """Restores the terminal. Never waits for output: stalled output must not keep the terminal raw."""
        self._is_wanted = self._is_current = False
        self._guard_at_s = None
        self._ledger.leave()
        if self._guardian is not None:
            self._guardian.stop()
            self._guardian = None

    def _start_guardian(self) -> None:
        from vsh.guardian import start_guardian  # noqa: PLC0415 - see GUARD_AFTER_S

        self._guard_at_s = None
        self._guardian = start_guardian(self._fd, lambda: self._ledger.leave(is_guardian=True))

    def _look_again(self) -> None:
        """Makes the terminal raw again after a stop: another job had it, and may have changed it."""
        if self._is_wanted:
            self._is_current = False
            self.enter()
