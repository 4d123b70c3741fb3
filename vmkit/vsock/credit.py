"""Credit: how many bytes each side of one connection may still send. Pure arithmetic, all of it modulo 2**32.

Specification: virtio 1.2, section 5.10.6.3. A receiver tells two numbers in every packet: buf_alloc, the size of its
buffer, and fwd_cnt, a running count of the bytes it has taken out of that buffer. A sender may have at most buf_alloc
bytes on their way, counted as its own running count minus fwd_cnt. The counters wrap; only their differences mean
anything.
"""

from typing import Final

MODULUS: Final = 2**32
_MASK: Final = MODULUS - 1


class SendCredit:
    """What we may send to the guest.

    Invariant: free() never exceeds what the guest last told, and never is negative.
    """

    __slots__ = ("peer_buf_alloc", "peer_fwd_cnt", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.peer_buf_alloc = 0
        self.peer_fwd_cnt = 0

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Takes over what a packet of the guest says of its buffer; the guest may raise, shrink or falsify it."""
        self.peer_buf_alloc = buf_alloc
        self.peer_fwd_cnt = fwd_cnt

    def free(self) -> int:
        """Bytes we may send now.

        A guest that claims more bytes than we sent has made its in-flight count huge: it gets nothing.
        """
        in_flight = (self.sent - self.peer_fwd_cnt) & _MASK
        return max(0, self.peer_buf_alloc - in_flight)

    def spend(self, size_bytes: int) -> None:
        """Counts bytes given to the guest; the caller has asked free() first."""
        self.sent = (self.sent + size_bytes) & _MASK


class ReceiveCredit:
    """What the guest may send to us.

    Invariant: 0 <= pending <= window, where pending bytes are ours to deliver still.
    """

    __slots__ = ("fwd_cnt", "pending", "told_fwd_cnt", "window")

    def __init__(self, window_bytes: int) -> None:
        self.window = window_bytes
        self.pending = 0
        self.fwd_cnt = 0
        self.told_fwd_cnt = 0

    def accept(self, size_bytes: int) -> bool:
        """Takes bytes of the guest in; False, and nothing changes, when they do not fit into the window we told."""
        if self.pending + size_bytes > self.window:
            return False
        self.pending += size_bytes
        return True

    def deliver(self, size_bytes: int) -> None:
        """Counts bytes that left our buffer, to the host program or, when nobody can take them, to nowhere."""
        self.pending -= size_bytes
        self.fwd_cnt = (self.fwd_cnt + size_bytes) & _MASK

    def tell(self) -> int:
        """The fwd_cnt for a packet that is being written now."""
        self.told_fwd_cnt = self.fwd_cnt
        return self.fwd_cnt

    def is_update_due(self, peer_buf_alloc: int) -> bool:
        """Whether the guest must be told of freed space although no other packet carries the news.

        Linux's driver limits itself to the smaller of our buffer and its own, so half of *that* is the mark: a device
        that waits for half of a larger window of its own would wait for ever.
        """
        freed = (self.fwd_cnt - self.told_fwd_cnt) & _MASK
        return freed > 0 and freed >= min(self.window, peer_buf_alloc) // 2
