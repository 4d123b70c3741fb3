"""How many bytes of requests are under way at once: the window grows while a larger one is faster. No I/O, no clock.

A round is a windowful of replies. A round that is faster than the best so far doubles the window. When a round is much
slower than the best, the window halves, because the peer or the disk has less to give.
"""

WINDOW_BYTES_MIN = 1 << 20
WINDOW_BYTES_MAX = 16 << 20
# A round must be so much faster that it is no accident.
GAIN = 1.1
LOSS = 0.5


class Window:
    """Invariant: WINDOW_BYTES_MIN <= limit_bytes <= WINDOW_BYTES_MAX, and held_bytes is what has no owner's receipt."""

    def __init__(self) -> None:
        self.limit_bytes = WINDOW_BYTES_MIN
        self.held_bytes = 0
        self._best = 0.0
        self._round_bytes = 0
        self._round_began_s: float | None = None
        self._was_full = False

    def has_room(self) -> bool:
        """Whether another request may go."""
        if self.held_bytes < self.limit_bytes:
            return True
        self._was_full = True
        return False

    def hold(self, cost_bytes: int) -> None:
        """A request goes."""
        self.held_bytes += cost_bytes

    def release(self, cost_bytes: int) -> None:
        """The owner has taken the request's reply."""
        self.held_bytes -= cost_bytes

    def count(self, size_bytes: int, now_s: float) -> None:
        """A reply came that moved so many bytes of a file."""
        if self._round_began_s is None:
            self._round_began_s = now_s
            return
        self._round_bytes += size_bytes
        if self._round_bytes < self.limit_bytes:
            return
        rate = self._round_bytes / max(now_s - self._round_began_s, 1e-6)
        # A window that was never full limits nothing.
        if rate > self._best * GAIN:
            self._best = rate
            if self._was_full:
                self.limit_bytes = min(self.limit_bytes * 2, WINDOW_BYTES_MAX)
        elif rate < self._best * LOSS:
            self._best = rate
            self.limit_bytes = max(self.limit_bytes // 2, WINDOW_BYTES_MIN)
        self._round_bytes, self._round_began_s, self._was_full = 0, now_s, False
