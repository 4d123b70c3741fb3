"""Fuzzes the host's reading of a guest's log: any bytes give records that are one line each, or a RecordError.

Longer than under pytest: python -m tests.fuzz.fuzz_syslog --cases 1000000 --seed 1
"""

import json
import random

from tests.fuzz.seeded import run_program
from vmkit.machine.syslog import LINE_MAX, Choice, render_record
from vmkit.monitor.lines import parse_record
from vshd.carry.records import HEADER, TEXT_MAX, LogReader, LogRecord, RecordError

LINES = (
    b"<13>Nov 30 12:00:00 root[12]: hello\n",
    b'<27>1 2026-11-30T12:00:00.1+00:00 host app 77 ID [a@1 k="v\\"]"][b] \xef\xbb\xbftext',
    b"6,339,5140900,-;Linux version 6.12\n SUBSYSTEM=pci\n",
    b"<14>app: \x1b]0;title\x07 \xe2\x80\xae \r\n<14>app: forged",
    b"<14>1 - - - - - [" + b'"\\' * 200,
    b"30\0ssh.service\0sshd\x0077\0Accepted key\nfor ann",
    b"",
)
PIECES = (
    b"<",
    b">",
    b"[",
    b"]",
    b'"',
    b"\\",
    b" ",
    b":",
    b";",
    b",",
    b"1 ",
    b"\n",
    b"\x1b[",
    b"\xff",
    b"\0",
    b"9" * 30,
)


def make_text(rng: random.Random) -> bytes:
    text = bytearray(rng.choice(LINES) if rng.random() < 0.9 else rng.randbytes(rng.randrange(200)))
    for _ in range(rng.randrange(8)):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randrange(3)] = rng.choice(PIECES) * rng.choice((1, 1, 1, 50))
    return bytes(text[:TEXT_MAX])


def make_stream(rng: random.Random) -> bytes:
    """Good records with some damage."""
    stream = bytearray()
    for _ in range(rng.randrange(6)):
        numbers = [rng.choice((0, 1, rng.getrandbits(size), (1 << size) - 1)) for size in (64, 64, 32, 32, 32)]
        record = LogRecord(rng.randrange(8), numbers[0], make_text(rng), flags=rng.randrange(256), time_ns=numbers[1])
        record.pid, record.uid, record.gid = numbers[2:]
        stream += record.encode()
    for _ in range(rng.choice((0, 0, 0, 1, 5))):
        if stream:
            stream[rng.randrange(len(stream))] = rng.randrange(256)
    return bytes(stream)


def run_seeded(rng: random.Random) -> bool:
    """One case; whether all of it was records. Raises whatever a case may not."""
    stream = make_stream(rng)
    reader = LogReader()
    at = size = 0
    while at < len(stream):
        piece = stream[at : at + rng.choice((1, 7, HEADER.size, 5000))]
        at += len(piece)
        try:
            records = reader.feed(piece)
        except RecordError:
            return False
        for record in records:
            size += HEADER.size + len(record.text)
            check(record)
    return size == len(stream)


def check(record: LogRecord) -> None:
    value = {"t": 1.0, "machine": "m", "cid": 3, **parse_record(record)}
    line = json.dumps(value)
    assert "\n" not in line
    assert len(line) < LINE_MAX
    assert Choice().is_wanted(json.loads(line))
    shown = render_record(value)
    assert all(letter.isprintable() or letter == "\t" for letter in shown)


if __name__ == "__main__":
    run_program(__doc__, "syslog", "whole", run_seeded)
