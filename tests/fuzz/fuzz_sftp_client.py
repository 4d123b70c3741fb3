"""Fuzzes what `vmkit cp` reads from a guest's SFTP server: damaged, cut, doubled and invented replies.

Each case ends with replies to requests that were sent, or with SftpError; data is never longer than was asked for.
Longer than under pytest: python -m tests.fuzz.fuzz_sftp_client --cases 100000
"""

import contextlib
import random
import struct

from tests.fuzz.fuzz_vsh_wire import cut, damage
from tests.fuzz.seeded import run_program
from vmkit.copy.calls import make_item
from vmkit.copy.connection import SftpConnection, Ticket
from vmkit.copy.items import FileError
from vmkit.copy.wire import (
    PACKET_BYTES_MAX,
    Cursor,
    DataReply,
    ExtendedReply,
    FileAttributes,
    Kind,
    NamesReply,
    SftpError,
    check_name,
    pack_attributes,
    pack_text,
)
from vmkit.copy.xattrs import check_xattrs

ASKED = (Kind.READ, Kind.READDIR, Kind.OPEN, Kind.STAT, Kind.READLINK, Kind.CLOSE, Kind.EXTENDED)
READ_BYTES = 300


def make_reply(rng: random.Random, kind: Kind, number: int) -> bytes:
    """A good reply, or a failure."""
    attributes = pack_attributes(FileAttributes(rng.getrandbits(64), 0, 0, rng.getrandbits(16), 1, 2))
    xattrs = ((rng.randbytes(3), b"value"), (b"user.gone", None))
    name = pack_text(rng.randbytes(rng.randrange(8))) + pack_text(b"long") + attributes
    count = rng.randrange(4)
    content = pack_text(b"name") + attributes + rng.choice((bytes(4), struct.pack(">I", 1) + pack_text(b"data")))
    listing = struct.pack(">I", count) + content * count
    replies = {
        Kind.READ: (103, pack_text(rng.randbytes(rng.randrange(1, READ_BYTES + 1)))),
        Kind.READDIR: (104, struct.pack(">I", count) + name * count),
        Kind.OPEN: (102, pack_text(b"handle")),
        Kind.STAT: (105, attributes),
        Kind.READLINK: (104, struct.pack(">I", 1) + name),
        Kind.EXTENDED: (201, rng.choice((rng.randbytes(40), pack_attributes(FileAttributes(xattrs=xattrs)), listing))),
    }
    failure = (101, struct.pack(">I", rng.randrange(10)) + pack_text(b"text") + pack_text(b""))
    answer, body = replies.get(kind, failure) if rng.random() < 0.8 else failure
    return struct.pack(">IBI", len(body) + 5, answer, number) + body


def run_case(rng: random.Random) -> bool:
    """Returns whether all replies were taken."""
    connection = SftpConnection()
    connection.send_init()
    sent = b"\0\0\0\x05\x02\0\0\0\x03"
    tickets: set[Ticket] = set()
    numbers = list(range(rng.randrange(1, 12)))
    kinds = [rng.choice(ASKED) for _ in numbers]
    for kind in kinds:
        tickets.add(connection.send(kind, b"x", size_bytes=READ_BYTES))
    rng.shuffle(numbers)
    for number in numbers:
        sent += make_reply(rng, kinds[number], number)
    if rng.random() < 0.7:
        sent = damage(rng, sent)
    got = 0
    try:
        for piece in cut(rng, sent):
            left = piece
            while left:
                buffer = connection.get_buffer()
                assert 0 < len(buffer) <= PACKET_BYTES_MAX
                count = min(len(buffer), len(left))
                buffer[:count] = left[:count]
                left = left[count:]
                for ticket, reply in connection.receive(count):
                    got += 1
                    check_reply(ticket, reply, tickets)
    except SftpError:
        return False
    return got == len(numbers) + 1


def check_reply(ticket: Ticket, reply: object, tickets: set[Ticket]) -> None:
    """Takes a reply as the copy does."""
    if ticket.kind != Kind.INIT:
        tickets.remove(ticket)
    if isinstance(reply, DataReply):
        assert 0 < len(reply.view) <= READ_BYTES
    elif isinstance(reply, NamesReply):
        for name, attributes in reply.names:
            assert b"/" not in check_name(name)
            make_item(attributes)
    elif isinstance(reply, ExtendedReply):
        with contextlib.suppress(FileError, SftpError):
            check_xattrs(Cursor(reply.body).take_attributes().xattrs)
        with contextlib.suppress(SftpError):
            for name, attributes, data in Cursor(reply.body).take_contents():
                assert len(name) + len(data or b"") < len(reply.body)
                make_item(attributes)


if __name__ == "__main__":
    run_program(__doc__, "sftp-client", "answered", run_case)
