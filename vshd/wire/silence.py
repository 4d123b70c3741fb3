"""When to say "alive", and when to give a silent peer up (docs/reference/protocol.md 2.7).

Times are seconds of the caller's clock.
"""

# Three chances to be heard before the deadline.
WORDS_PER_DEADLINE = 3


class Silence:
    """Invariant: times only move forward; a limit of 0 means never."""

    __slots__ = ("_give_up_after_s", "_heard_at_s", "_held", "_said_at_s", "_say_every_s")

    def __init__(self, *, own_ms: int, peer_ms: int, now_s: float) -> None:
        """own_ms: after how long we give the peer up. peer_ms: after how long it gives us up."""
        self._give_up_after_s = own_ms / 1000
        self._say_every_s = peer_ms / 1000 / WORDS_PER_DEADLINE
        self._heard_at_s = now_s
        self._said_at_s = now_s
        self._held = False

    def heard(self, now_s: float) -> None:
        """Any bytes came."""
        self._heard_at_s = now_s
        self._held = False

    def said(self, now_s: float) -> None:
        """Any bytes left."""
        self._said_at_s = now_s

    def hold(self) -> None:
        """The peer announced that it will be stopped."""
        self._held = True

    def is_peer_lost(self, now_s: float) -> bool:
        return not self._held and 0 < self._give_up_after_s <= now_s - self._heard_at_s

    def is_word_due(self, now_s: float) -> bool:
        return 0 < self._say_every_s <= now_s - self._said_at_s

    def wait_s(self, now_s: float) -> float | None:
        """How long until there is something to do; None: never."""
        waits = []
        if self._say_every_s:
            waits.append(self._said_at_s + self._say_every_s - now_s)
        if self._give_up_after_s and not self._held:
            waits.append(self._heard_at_s + self._give_up_after_s - now_s)
        return max(0.0, min(waits)) if waits else None
