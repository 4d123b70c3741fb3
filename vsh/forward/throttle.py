"""Lines about connections that failed: some at once, of the others their number.

A program of the guest can make connections fail as often as it likes. That must not fill a terminal or a log.
"""

import time
from collections.abc import Callable

# In each period so many lines are told; the number of the others is told at its end.
LINES_MAX = 10
PERIOD_S = 60.0


class Throttle:
    """Invariant: while lines are held back, `_end_s` is when their number is told."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._told = 0
        self._held = 0
        self._last = ""
        self._end_s = 0.0

    def say(self, text: str) -> None:
        """Tells a line, or counts it."""
        self.tend()
        if not self._told:
            self._end_s = time.monotonic() + PERIOD_S
        if self._told < LINES_MAX:
            self._told += 1
            self._tell(text)
        else:
            self._held += 1
            self._last = text

    def tend(self) -> float | None:
        """Tells the number when it is time; the seconds until then, None when nothing is held back."""
        left_s = self._end_s - time.monotonic()
        if self._told and left_s <= 0:
            self.flush()
            self._told = 0
        return left_s if self._held else None

    def flush(self) -> None:
        """Tells the number of those held back now."""
        if self._held:
            self._tell(f"{self._held} more like these, the last: {self._last}")
        self._held = 0
