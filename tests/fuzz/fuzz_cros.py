"""Fuzzes what a guest sends by LogCollector: any bytes are records or refused, as Google's codec has it.

Longer than under pytest: python -m tests.fuzz.fuzz_cros --cases 1000000 --seed 1
"""

import random

from google.protobuf.message import DecodeError

from tests.fuzz.fuzz_syslog import check
from tests.fuzz.seeded import run_program
from tests.vmkit.cros.google import CLASSES, make_request
from vmkit.cros.messages import LogRequest
from vmkit.cros.notes import make_line
from vshd.carry.records import TEXT_MAX, LogReader
from vshd.wire.errors import RemoteProtocolError

CONTENTS = (b"", b" app[1]: text", b"<0>kernel: x\n", b"\xff\0\x1b[2J", b"x" * 9000)
TIMES = (0, 1, 5_000_000_006, (1 << 62), 10**9 * ((1 << 33) - 1))
PIECES = (b"\n", b"\x0a\x02\x08\x04", b"\xff" * 9 + b"\x01", b"\x80" * 11, b"\x0b", b"\x0c", b"\x12\0", b"\0")


def make_bytes(rng: random.Random) -> bytes:
    records = [
        {"severity": rng.randrange(9), "content": rng.choice(CONTENTS), "time": rng.choice(TIMES)}
        for _ in range(rng.randrange(4))
    ]
    data = bytearray(make_request(*records).SerializeToString())
    for _ in range(rng.choice((0, 0, 1, 1, 3))):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.choice(PIECES) if rng.random() < 0.7 else rng.randbytes(2)
    return bytes(data)


def run_seeded(rng: random.Random) -> bool:
    """One case. True where the bytes are records."""
    data = make_bytes(rng)
    theirs = CLASSES["LogRequest"]()
    try:
        theirs.ParseFromString(data)
    except DecodeError:
        is_theirs = False
    else:
        is_theirs = True
    request = LogRequest()
    try:
        request.merge(data)
        records = request.read_records()
    except RemoteProtocolError as error:
        # Google's codec passes over a field of number 0, which no message can have.
        assert not is_theirs or "field number" in str(error), data
        return False
    if is_theirs:
        assert [record.content for record in records] == [record.content for record in theirs.records], data
    for record in records:
        note = make_line(record, 1)
        assert len(note.text) <= TEXT_MAX
        # As the monitor reads it.
        (again,) = LogReader().feed(note.encode())
        check(again)
    return True


if __name__ == "__main__":
    run_program(__doc__, "cros", "records", run_seeded)
