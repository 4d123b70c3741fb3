"""The records of a trace, as the device writes them and a program reads them: bytes to values and back. Pure.

A record is 24 bytes, little endian: time in ns since 1970 (u64), how many packets were dropped before this one (u32),
how many bytes of the payload follow (u32), the kind (u8), and 7 bytes of zero. The packet's header of 44 bytes and the
payload's first bytes follow. A record of the kind GAP has neither, and counts dropped packets alone.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from vmkit.vsock.packet import HEADER_SIZE, Header, decode_header

RECORD: Final = struct.Struct("<QIIB7x")
TO_GUEST_KIND: Final = 0
FROM_GUEST_KIND: Final = 1
GAP_KIND: Final = 2


class TraceError(Exception):
    """The bytes are no records of a trace."""


class Captured(NamedTuple):
    """One packet. `dropped`: packets before it that are missing. `header` is None for a gap without a packet."""

    time_ns: int
    is_from_guest: bool
    header: Header | None
    payload: bytes
    dropped: int


def encode_record(
    time_ns: int, header: bytes, pieces: list[memoryview], payload_bytes: int, *, is_from_guest: bool, dropped: int = 0
) -> bytearray:
    """One packet's record, with the first `payload_bytes` bytes of the pieces."""
    kind = FROM_GUEST_KIND if is_from_guest else TO_GUEST_KIND
    record = bytearray(RECORD.size)
    record += header
    left = payload_bytes
    for piece in pieces:
        if not left:
            break
        record += piece[:left]
        left = payload_bytes - (len(record) - RECORD.size - HEADER_SIZE)
    RECORD.pack_into(record, 0, time_ns, dropped, payload_bytes - left, kind)
    return record


def encode_gap(time_ns: int, dropped: int) -> bytes:
    """A record that only counts dropped packets."""
    return RECORD.pack(time_ns, dropped, 0, GAP_KIND)


class RecordReader:
    """Cuts a stream into records. Invariant: `_rest` is less than one whole record once feed() is exhausted."""

    def __init__(self, max_payload_bytes: int) -> None:
        """Takes no record with a longer payload than that."""
        self._max_payload_bytes = max_payload_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Captured]:
        """Yields the records that are complete now. Raises TraceError."""
        self._rest += data
        while len(self._rest) >= RECORD.size:
            time_ns, dropped, payload_bytes, kind = RECORD.unpack_from(self._rest)
            if kind > GAP_KIND or payload_bytes > self._max_payload_bytes:
                raise TraceError("the device sent something other than a record")
            head = RECORD.size if kind == GAP_KIND else RECORD.size + HEADER_SIZE
            if len(self._rest) < head + payload_bytes:
                return
            header = None if kind == GAP_KIND else decode_header(self._rest[RECORD.size : head])
            payload = bytes(self._rest[head : head + payload_bytes])
            del self._rest[: head + payload_bytes]
            yield Captured(time_ns, kind == FROM_GUEST_KIND, header, payload, dropped)
