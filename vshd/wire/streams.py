"""What may still be sent or received on one stream, and the credit for it (docs/reference/protocol.md 2.4).

Credit None means legacy mode: no accounting.
"""

from vshd.wire.errors import RemoteProtocolError

CREDIT_MAX = (1 << 31) - 1
# Legacy mode has no credit: what a driver reads at once is the bound there.
UNBOUNDED = 1 << 30


class SendStream:
    """A stream we send. Invariant: `credit` is never negative."""

    __slots__ = ("credit", "is_closed", "is_ended")

    def __init__(self) -> None:
        self.credit: int | None = None
        self.is_ended = False
        self.is_closed = False

    @property
    def room(self) -> int:
        """How many bytes may be sent now."""
        if self.is_ended or self.is_closed:
            return 0
        return UNBOUNDED if self.credit is None else self.credit

    def add_credit(self, size: int) -> None:
        if self.credit is None:
            return
        if self.credit + size > CREDIT_MAX:
            raise RemoteProtocolError("more credit than 2^31 - 1")
        self.credit += size


class ReceiveStream:
    """A stream we receive.

    Invariant: the peer may send `allowance` more bytes; `consumed` bytes were not yet given back as credit.
    """

    __slots__ = ("allowance", "consumed", "is_closed", "is_ended", "window")

    def __init__(self) -> None:
        self.allowance: int | None = None
        self.window = 0
        self.consumed = 0
        self.is_ended = False
        self.is_closed = False

    def open_window(self, window: int) -> None:
        self.window = window
        self.allowance = window

    def take(self, size: int) -> None:
        """The peer sent `size` bytes. Raises RemoteProtocolError when it had no credit for them."""
        if self.allowance is None:
            return
        if size > self.allowance:
            raise RemoteProtocolError("data without credit")
        self.allowance -= size

    def give_back(self, size: int) -> int:
        """`size` bytes were consumed: the credit to send now, 0 while it is too little to be worth a frame."""
        if self.allowance is None or self.is_ended or self.is_closed:
            return 0
        self.consumed += size
        if self.consumed * 2 < self.window:
            return 0
        credit, self.consumed = self.consumed, 0
        self.allowance += credit
        return credit
