"""Credit: how many bytes each side of one connection may still send. Pure arithmetic, all of it modulo 2**32.

Specification: virtio 1.2, section 5.10.6.3. A receiver puts two numbers into every packet: buf_alloc, the size of its
buffer, and fwd_cnt, a running count of the bytes it has taken out of that buffer. A sender may have at most buf_alloc
bytes on their way, counted as its own running count minus fwd_cnt. The counters wrap, so only their differences count.
"""

from typing import Final

MODULUS: Final = 2**32
_MASK: Final = MODULUS - 1


class SendCredit:
    """The credit for bytes that we send to the guest.

    Invariant: free() never exceeds the guest's last numbers, and never is negative.
    """

    __slots__ = ("peer_buf_alloc", "peer_fwd_cnt", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Takes over the numbers in a packet of the guest. The guest may raise, shrink or falsify them."""
        self.peer_buf_alloc = buf_alloc
        self.peer_fwd_cnt = fwd_cnt

    def free(self) -> int:
        """Returns how many bytes we may send now.

        A guest that claims more bytes than we sent has made its in-flight count huge: it gets nothing.
        """
        in_flight = (self.sent - self.peer_fwd_cnt) & _MASK
        return max(0, self.peer_buf_alloc - in_flight)

    def spend(self, size_bytes: int) -> None:
        """Counts bytes given to the guest; the caller has asked free() first."""
        self.sent = (self.sent + size_bytes) & _MASK


class ReceiveCredit:
    """The credit for bytes that the guest sends to us.

    Invariant: 0 <= pending <= window, where pending bytes are not delivered yet.
    """

    __slots__ = ("fwd_cnt", "pending", "told_fwd_cnt", "window")
    is_frozen = False

    def __init__(self, window_bytes: int) -> None:
        self.window = window_bytes
        self.pending = 0
        self.fwd_cnt = 0
        self.told_fwd_cnt = 0

    def accept(self, size_bytes: int) -> bool:
        """Takes bytes of the guest in. False, and no change, when they do not fit into the announced window."""
        if self.pending + size_bytes > self.window:
            return False
        self.pending += size_bytes
        return True

    def deliver(self, size_bytes: int) -> None:
        """Counts bytes that left our buffer: the host program took them, or they were dropped."""
        self.pending -= size_bytes
        self.fwd_cnt = (self.fwd_cnt + size_bytes) & _MASK

    def tell(self) -> int:
        """Returns the fwd_cnt for the packet that is written now, and notes it as sent."""
        self.told_fwd_cnt = self.fwd_cnt
        return self.fwd_cnt

    def is_update_due(self, peer_buf_alloc: int) -> bool:
        """Whether a CREDIT_UPDATE must announce freed space because no other packet does.

        Linux's driver limits itself to the smaller of our buffer and its own, so half of *that* is the mark. A device
        that waits for half of a larger window of its own would wait for ever.
        """
        freed = (self.fwd_cnt - self.told_fwd_cnt) & _MASK
        return freed > 0 and freed >= min(self.window, peer_buf_alloc) // 2


class FrozenSendCredit(SendCredit):
    """Credit that stays as it is, whatever the guest sends: a fault that a user asked for."""

    __slots__ = ("_latest",)

    def __init__(self, credit: SendCredit) -> None:
        self.sent = credit.sent
        self.peer_buf_alloc = credit.peer_buf_alloc
        self.peer_fwd_cnt = credit.peer_fwd_cnt
        self._latest = credit.peer_buf_alloc, credit.peer_fwd_cnt

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Keeps the numbers for thaw()."""
        self._latest = buf_alloc, fwd_cnt

    def thaw(self) -> SendCredit:
        """Returns credit with the guest's last numbers."""
        credit = SendCredit()
        credit.sent = self.sent
        credit.update(*self._latest)
        return credit


class FrozenReceiveCredit(ReceiveCredit):
    """Credit of which the guest gets no more: a fault that a user asked for. The bytes themselves are delivered."""

    __slots__ = ("_withheld",)
    is_frozen = True

    def __init__(self, credit: ReceiveCredit) -> None:
        super().__init__(credit.window)
        self.pending = credit.pending
        self.fwd_cnt = self.told_fwd_cnt = credit.told_fwd_cnt
        self._withheld = (credit.fwd_cnt - credit.told_fwd_cnt) & _MASK

    def accept(self, size_bytes: int) -> bool:
        """Takes bytes in, as long as the guest keeps to the credit that it has."""
        if self.pending + self._withheld + size_bytes > self.window:
            return False
        self.pending += size_bytes
        return True

    def deliver(self, size_bytes: int) -> None:
        """Counts bytes that left our buffer, for thaw()."""
        self.pending -= size_bytes
        self._withheld = (self._withheld + size_bytes) & _MASK

    def thaw(self) -> ReceiveCredit:
        """Returns credit that has all freed space to announce."""
        credit = ReceiveCredit(self.window)
        credit.pending = self.pending
        credit.told_fwd_cnt = self.told_fwd_cnt
        credit.fwd_cnt = (self.fwd_cnt + self._withheld) & _MASK
        return credit
