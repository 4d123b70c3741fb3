"""The trace of all packets: one buffer with a ceiling for each program that follows. It never waits and never grows.

It knows no sockets: control.py empties the buffers. Without a program that follows, the device has no Tap. A packet
then costs one comparison with None, and its header's place among the recent ones, which are kept for those who come
after a fault.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from vmkit.vsock.packet import HEADER, Header
from vmkit.vsock.records import encode_gap, encode_record
from vmkit.vsock.requests import TraceRequest

# A program that prints lines is slower than a guest in bulk. The rest is dropped, and counted.
BUFFER_BYTES: Final = 1 << 20
# The packets whose headers are kept. As an answer of hexadecimal digits they take 35 KiB.
RECENT_PACKETS: Final = 256

# The time in ns since 1970, the header as it was seen, and whether it came from the guest.
Recent = deque[tuple[int, Header | bytes, bool]]


def make_recent() -> Recent:
    """An empty record of recent packets; it drops the oldest ones."""
    return deque(maxlen=RECENT_PACKETS)


def encode_recent(recent: Recent) -> list[bytearray]:
    """The records of the recent packets, without payloads, the oldest first."""
    return [
        encode_record(time_ns, seen.encode() if isinstance(seen, Header) else seen, [], 0, is_from_guest=is_from_guest)
        for time_ns, seen, is_from_guest in recent
    ]


class Follower:
    """One program's view of the packets. Invariant: `buffer` holds whole records, BUFFER_BYTES at most."""

    __slots__ = ("_clock_ns", "buffer", "dropped", "wanted")

    def __init__(self, wanted: TraceRequest, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self.wanted = wanted
        self.buffer = bytearray()
        # Packets that were dropped since the last record.
        self.dropped = 0
        self._clock_ns = clock_ns

    def note(self, header: Header, pieces: list[memoryview], *, is_from_guest: bool) -> None:
        """Adds a packet's record, or counts it as dropped when there is no room."""
        wanted = self.wanted
        if not wanted.matches(header.op, header.src_port, header.dst_port, is_from_guest=is_from_guest):
            return
        room = BUFFER_BYTES - len(self.buffer)
        record = encode_record(
            self._clock_ns(),
            header.encode(),
            pieces,
            min(wanted.snaplen, header.length),
            is_from_guest=is_from_guest,
            dropped=self.dropped,
        )
        if len(record) > room:
            self.dropped += 1
            return
        self.buffer += record
        self.dropped = 0

    def report_gap(self) -> None:
        """Adds a record of what was dropped, when the buffer is empty and no packet has come to carry the count."""
        if self.dropped and not self.buffer:
            self.buffer += encode_gap(self._clock_ns(), self.dropped)
            self.dropped = 0


class Tap:
    """All programs that follow the packets."""

    def __init__(self) -> None:
        self.followers: list[Follower] = []

    def note(self, header: Header, pieces: list[memoryview], *, is_from_guest: bool) -> None:
        """Takes a packet. The pieces of its payload may point into the guest's memory."""
        for follower in self.followers:
            follower.note(header, pieces, is_from_guest=is_from_guest)

    def note_encoded(self, header: bytes, pieces: list[memoryview]) -> None:
        """Takes a packet to the guest whose header is encoded already."""
        self.note(Header._make(HEADER.unpack(header)), pieces, is_from_guest=False)
