"""Finds header and payload of a packet in the guest's buffers, wherever the guest cut them.

A device must not rely on how a driver cuts its buffers into descriptors (virtio 1.2, 2.7.4), and drivers differ.
"""

from typing import Final

from vmkit.vsock.packet import HEADER_SIZE, Header, decode_header
from vmkit.vsock.vring import Chain, RingError, Vring

# Python has no name for it: UIO_MAXIOV, linux/uio.h.
IOV_MAX: Final = 1024


def split_packet(segments: list[memoryview]) -> tuple[Header, list[memoryview], int]:
    """Splits a packet of the guest into its header, the pieces of its payload, and their total size in bytes.

    It copies the header before it reads it.
    """
    first = segments[0] if segments else memoryview(b"")
    if len(first) == HEADER_SIZE:
        # As Linux's driver cuts it. The header is read once, field by field, into this process.
        payload = segments[1:]
        return decode_header(first), payload, sum(map(len, payload))
    payload = skip_header(segments)
    head = bytes(first[:HEADER_SIZE])
    for segment in segments[1:]:
        if len(head) == HEADER_SIZE:
            break
        head += bytes(segment[: HEADER_SIZE - len(head)])
    if len(head) < HEADER_SIZE:
        raise ValueError(f"a packet of {len(head)} bytes, shorter than its header")
    return decode_header(head), payload, sum(map(len, payload))


def skip_header(segments: list[memoryview]) -> list[memoryview]:
    """Returns the pieces behind the header, wherever the guest cut them.

    Empty when the packet is a header alone, or shorter than one.
    """
    to_skip = HEADER_SIZE
    for index, segment in enumerate(segments):
        if to_skip < len(segment):
            return [segment[to_skip:], *segments[index + 1 :]] if to_skip else segments[index:]
        to_skip -= len(segment)
    return []


def measure_room(chain: Chain) -> int:
    """Divides a buffer that is to be filled: notes its payload's pieces and returns how many bytes they hold.

    A buffer for a header alone holds none. It can carry every packet but RW.
    """
    chain.payload = skip_header(chain.segments)
    chain.room = sum(map(len, chain.payload))
    return chain.room


def choose_buffers(ring: Vring, count: int, credit: int) -> tuple[list[Chain], list[memoryview], int]:
    """Returns the guest's buffers for up to `credit` bytes: chains, the pieces behind their headers, their room."""
    chains: list[Chain] = []
    buffers: list[memoryview] = []
    room = 0
    for chain in ring.peek(count):
        if len(chains) == count or room == credit:
            break
        size_bytes = chain.room or measure_room(chain)
        if not size_bytes:
            break
        payload = chain.payload
        if chains and len(buffers) + len(payload) > IOV_MAX:
            break
        if room + size_bytes > credit:
            payload = trim_pieces(payload, size_bytes, credit - room)
            size_bytes = credit - room
        chains.append(chain)
        buffers += payload
        room += size_bytes
    return chains, buffers, room


def write_header(segments: list[memoryview], header: bytes) -> None:
    first = segments[0] if segments else memoryview(b"")
    if len(first) >= HEADER_SIZE:
        first[:HEADER_SIZE] = header
        return
    if sum(map(len, segments)) < HEADER_SIZE:
        raise RingError("an rx buffer without room for a header")
    done = 0
    for segment in segments:
        size_bytes = min(len(segment), HEADER_SIZE - done)
        segment[:size_bytes] = header[done : done + size_bytes]
        done += size_bytes
        if done == HEADER_SIZE:
            return


def trim_pieces(pieces: list[memoryview], size_bytes: int, limit: int) -> list[memoryview]:
    """Returns the first `limit` bytes of pieces of size_bytes altogether: no data lies behind the packet's length."""
    if size_bytes == limit:
        return pieces
    kept = []
    left = limit
    for piece in pieces:
        if not left:
            break
        kept.append(piece[:left])
        left -= len(kept[-1])
    return kept
