"""Whether the peer reacts to signals: one that has deadlocked must not hold the client for ever.

ChromeOS's server writes to its target and reads from us in one loop. When the target takes no more stdin, the server
takes no more signals either, and its protocol acknowledges none. Knows nothing of descriptors and clocks.
"""

# So many SIGTERMs are no accident: the person insists.
PLEAS = 3
# From the first of them: more than a server needs to answer, and a target to write a word.
PLEA_GRACE_S = 2.0
# A signal that has not left by then will not: the peer reads nothing.
SEND_GRACE_S = 5.0


class Reaction:
    """Invariant: `_waiting_since_s` is set only while the peer has sent nothing after a signal to it."""

    __slots__ = ("_moved_at_s", "_pleas", "_waiting_since_s")

    def __init__(self) -> None:
        self._waiting_since_s: float | None = None
        self._moved_at_s = 0.0
        self._pleas = 0

    def signalled(self, now_s: float, *, is_plea: bool) -> None:
        """Notes that a signal was sent. is_plea: it asks for the end, and this peer would not acknowledge it."""
        if self._waiting_since_s is None:
            self._waiting_since_s = self._moved_at_s = now_s
            self._pleas = 0
        if is_plea:
            self._pleas += 1

    def moved(self, now_s: float) -> None:
        """Notes that the peer took some bytes."""
        self._moved_at_s = now_s

    def heard(self) -> None:
        """Notes that the peer sent some bytes."""
        self._waiting_since_s = None

    def find_fault(self, now_s: float, *, is_sent: bool) -> str:
        """Returns why the peer counts as stuck, or empty text. is_sent: the transport has taken all bytes for it."""
        if self._waiting_since_s is None:
            return ""
        if self._pleas >= PLEAS and now_s >= self._waiting_since_s + PLEA_GRACE_S:
            return f"it did not react to {self._pleas} SIGTERMs"
        if not is_sent and now_s >= self._moved_at_s + SEND_GRACE_S:
            return f"it has read nothing for {SEND_GRACE_S:g} s, not even a signal"
        return ""

    def wait_s(self, now_s: float, *, is_sent: bool) -> float | None:
        """Returns the seconds until find_fault() can find a fault; None: not before the next event."""
        if self._waiting_since_s is None:
            return None
        waits = []
        if self._pleas >= PLEAS:
            waits.append(self._waiting_since_s + PLEA_GRACE_S - now_s)
        if not is_sent:
            waits.append(self._moved_at_s + SEND_GRACE_S - now_s)
        return max(0.0, min(waits)) if waits else None
