"""How long a client of a forward waits for its other side: as long as the guest serves others, and a while beyond that.

A slow guest serves many clients one after another. A limit for each client would give up the last ones, although their
turn comes. So the time runs from the last connection that was opened, not from when this client came.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from vsh.errors import Busy, ExecError, Unanswered, VshError
from vshd.wire import messages

# Between two attempts where every place is taken: the first pause, doubled up to the last.
PAUSES_S = (0.05, 1.0)

T = TypeVar("T")


class Patience:
    """Used by many threads; `_served_s` only grows."""

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: how long no client is served before one is given up."""
        self.timeout_s = timeout_s
        self._served_s = 0.0

    def open(self, attempt: Callable[[float], T], is_wanted: Callable[[], bool]) -> T:
        """What `attempt`, which takes a timeout, gives; repeated as long as waiting can help and `is_wanted` says so.

        Raises VshError.
        """
        began_s = time.monotonic()
        pause_s, longest_s = PAUSES_S
        while True:
            attempt_s = time.monotonic()
            try:
                opened = attempt(self.timeout_s)
            except VshError as error:
                is_slow = self.is_worth_another(error, attempt_s)
                if not is_wanted() or not (is_slow or (is_full(error) and self._is_in_time(began_s))):
                    raise
            else:
                self.note_served()
                return opened
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def note_served(self) -> None:
        """A connection was opened just now."""
        self._served_s = time.monotonic()

    def is_worth_another(self, error: VshError, attempt_s: float) -> bool:
        """Whether the guest gave no answer to an attempt of that time because it served others meanwhile."""
        return _is_slow(error) and self._served_s > attempt_s

    def _is_in_time(self, began_s: float) -> bool:
        return time.monotonic() < max(began_s, self._served_s) + self.timeout_s


def _is_slow(error: VshError) -> bool:
    """Whether nothing answered: the guest, or in it the server that its vshd connects to."""
    return isinstance(error, Unanswered) or (isinstance(error, ExecError) and error.error == errno.ETIMEDOUT)


def is_full(error: VshError) -> bool:
    """Whether the guest has no place for one more session now."""
    return isinstance(error, Busy) or (isinstance(error, ExecError) and error.kind == messages.LIMIT)
