"""The device's log: one line on stderr for each notable event, counted always, printed at a bounded rate.

A guest can cause most of these events at will. It must not be able to fill a disk with them.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Final

# Of one kind, so many lines in so many seconds; the rest is counted and printed in one line later.
BURST_LINES: Final = 5
PERIOD_S: Final = 10.0
_STDERR: Final = 2


def write_stderr(line: str) -> None:
    """Writes one line to stderr if that takes it now: a reader that sleeps or is gone must not stop the device."""
    with contextlib.suppress(OSError):
        # A pipe that is writable takes a line of less than PIPE_BUF bytes whole.
        if select.select([], [_STDERR], [], 0)[1]:
            os.write(_STDERR, f"{line}\n".encode(errors="backslashreplace"))


class _Kind:
    """One kind of event: how often it happened, and how many lines the current period has left."""

    __slots__ = ("hidden", "period_end_s", "printed", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.printed = 0
        self.hidden = 0
        self.period_end_s = 0.0


class Notices:
    """Counts events by kind and prints some. Kinds are words of this code, so their number is bounded."""

    def __init__(
        self, prefix: str, write: Callable[[str], None] = write_stderr, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._prefix = prefix
        self._write = write
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def tell(self, kind: str, text: str) -> None:
        """Counts an event of this kind, and prints its line within the rate."""
        entry = self._kinds.setdefault(kind, _Kind())
        entry.seen += 1
        now_s = self._clock()
        if now_s >= entry.period_end_s:
            if entry.hidden:
                self._write(f"{self._prefix}{kind}: {entry.hidden} more not shown")
            entry.printed = entry.hidden = 0
            entry.period_end_s = now_s + PERIOD_S
        if entry.printed >= BURST_LINES:
            entry.hidden += 1
            return
        entry.printed += 1
        self._write(f"{self._prefix}{kind}: {text}")

    def note(self, kind: str) -> None:
        """Counts an event without printing a line."""
        self._kinds.setdefault(kind, _Kind()).seen += 1

    def count(self, kind: str) -> int:
        """Returns how often an event of this kind was counted."""
        entry = self._kinds.get(kind)
        return entry.seen if entry else 0

    def render_counts(self) -> str:
        """Returns all kinds with their counts, for the last line of the log."""
        return ", ".join(f"{kind} {entry.seen}" for kind, entry in sorted(self._kinds.items()))
