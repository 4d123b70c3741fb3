"""Fuzzes what lasting sessions add: the list that a client reads, and the calls that a keeper takes.

Any bytes are messages or an error, in pieces of any size the same, and what is read is written again unchanged. A ring
gives each client what was said, at any sizes. Longer than under pytest: python -m tests.fuzz.fuzz_lasting --cases
1000000 --seed 1
"""

import random

from tests.fuzz.seeded import run_program
from vshd.lasting.ring import MemoryStore, Ring
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.kept import KeeperAnswer, KeeperCall, ListReader, SessionRecord, encode_record
from vshd.wire.messages import Extended, Failure, PositionMessage
from vshd.wire.proto3 import BOOL, BYTES, MESSAGE, Message
from vshd.wire.requests import Attach, Lasting

KINDS = (KeeperCall, KeeperAnswer, SessionRecord, Lasting, Attach, PositionMessage)
NUMBERS = (0, 1, 2, 5, 127, 128, (1 << 31) - 1)


def make_message(rng: random.Random, kind: type[Message]) -> Message:
    """A message with some of its fields."""
    message = kind()
    for field in kind.FIELDS:
        if rng.random() < 0.4:
            continue
        if field.kind == BYTES:
            setattr(message, field.name, rng.randbytes(rng.choice((0, 1, 8, 300))))
        elif field.kind == BOOL:
            setattr(message, field.name, rng.random() < 0.5)
        elif field.kind == MESSAGE:
            assert field.message in (Attach, Extended, Failure, SessionRecord)
            setattr(message, field.name, make_message(rng, field.message))
        else:
            setattr(message, field.name, rng.choice(NUMBERS))
    return message


def damage(rng: random.Random, data: bytes) -> bytes:
    """The same bytes, or some of them changed, lost or more."""
    damaged = bytearray(data)
    if damaged and rng.random() < 0.5:
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    if rng.random() < 0.1:
        del damaged[rng.randrange(len(damaged) + 1) :]
    return bytes(damaged)


def read_list(data: bytes, sizes: list[int]) -> list[bytes] | None:
    """The records of a list that comes in pieces; None for one that is refused."""
    reader, records = ListReader(), []
    try:
        for size in sizes:
            records += reader.receive(data[:size])
            data = data[size:]
        records += reader.receive(data)
    except RemoteProtocolError:
        return None
    return [record.encode() for record in records]


def check_ring(rng: random.Random) -> None:
    """What a client reads in pieces is what was said, from the first byte that is kept."""
    ring = Ring(MemoryStore(rng.choice((1, 7, 100, 5000))))
    said = b""
    streams = b""
    for _ in range(rng.randrange(60)):
        stream, data = rng.choice((2, 3)), rng.randbytes(rng.choice((1, 2, 90, 400)))
        ring.append(stream, memoryview(data))
        said += data
        streams += bytes([stream]) * len(data)
    offset = ring.start
    while offset < ring.end:
        stream, data = ring.read(offset, rng.choice((1, 3, 1000)))
        assert data
        assert said[offset:].startswith(data)
        assert streams[offset : offset + len(data)] == bytes([stream]) * len(data)
        offset += len(data)
    assert ring.end == len(said)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether the message was whole. Raises whatever a case may not."""
    check_ring(rng)
    records = [make_message(rng, SessionRecord) for _ in range(rng.randrange(4))]
    data = damage(rng, b"".join(encode_record(record) for record in records if isinstance(record, SessionRecord)))
    assert read_list(data, []) == read_list(data, [rng.randrange(9) for _ in range(200)])
    message = rng.choice(KINDS)()
    try:
        message.merge(damage(rng, make_message(rng, type(message)).encode()))
    except RemoteProtocolError:
        return False
    again = type(message)()
    again.merge(message.encode())
    assert again.encode() == message.encode()
    return True


if __name__ == "__main__":
    run_program(__doc__, "lasting", "whole", run_seeded)
