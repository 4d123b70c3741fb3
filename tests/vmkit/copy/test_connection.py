"""Packets in and out: requests as the draft has them, replies in any pieces and any order."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.copy.connection import SftpConnection, Ticket
from vmkit.copy.wire import (
    CHUNK_BYTES_MAX,
    DataReply,
    FileAttributes,
    HandleReply,
    Kind,
    NamesReply,
    Reply,
    SftpError,
    StatusReply,
    VersionReply,
    pack_attributes,
    pack_text,
    parse_limits,
    parse_room,
)


def frame(kind: int, number: int, body: bytes) -> bytes:
    return struct.pack(">IBI", len(body) + 5, kind, number) + body


def feed(connection: SftpConnection, data: bytes, sizes: list[int] | None = None) -> list[tuple[Ticket, Reply]]:
    """Gives bytes to a connection as a socket does: in pieces of these sizes, which its buffers may make smaller."""
    replies = []
    pieces = iter(sizes or [])
    while data:
        buffer = connection.get_buffer()
        count = min(next(pieces, len(data)), len(buffer), len(data))
        buffer[:count] = data[:count]
        data = data[count:]
        replies += connection.receive(count)
    return replies


def take(connection: SftpConnection) -> bytes:
    data = b"".join(connection.output)
    connection.output.clear()
    return data


def test_requests_have_the_form_of_the_draft() -> None:
    connection = SftpConnection()
    connection.send_init()
    assert take(connection) == bytes.fromhex("00000005 01 00000003")
    connection.send(Kind.OPEN, b"/a", tail=struct.pack(">II", 1, 0))
    assert take(connection) == bytes.fromhex("00000013 03 00000000 00000002 2f61 00000001 00000000")
    ticket = connection.send(Kind.WRITE, b"h", tail=bytes(8), data=b"data")
    assert take(connection) == bytes.fromhex("0000001a 06 00000001 00000001 68 0000000000000000 00000004 64617461")
    assert ticket.size_bytes == 4
    connection.send(Kind.WRITE, b"h", tail=bytes(8), data=b"")
    assert take(connection).endswith(bytes(12))


def test_attributes_leave_out_half_pairs() -> None:
    assert pack_attributes(FileAttributes(uid=1, atime_s=2)) == bytes(4)
    whole = FileAttributes(5, 1, 2, 0o644, 3, 4)
    assert pack_attributes(whole).hex() == "0000000f00000000000000050000000100000002000001a40000000300000004"


def test_replies_come_in_any_order() -> None:
    connection = SftpConnection()
    first = connection.send(Kind.READ, b"h", tail=bytes(12), size_bytes=10)
    second = connection.send(Kind.OPENDIR, b"d")
    data = frame(102, 1, pack_text(b"handle")) + frame(103, 0, pack_text(b"bytes"))
    (one, handle), (other, read) = feed(connection, data)
    assert (one, other) == (second, first)
    assert handle == HandleReply(b"handle")
    assert isinstance(read, DataReply)
    assert bytes(read.view) == b"bytes"
    assert connection.waiting == 0


@given(st.lists(st.integers(0, 150_000), max_size=6), st.lists(st.integers(1, 70_000), max_size=40))
def test_replies_come_in_any_pieces(sizes: list[int], pieces: list[int]) -> None:
    connection = SftpConnection()
    sent = b""
    for number, size in enumerate(sizes):
        connection.send(Kind.READ, b"h", tail=bytes(12), size_bytes=max(size, 1))
        sent += frame(103, number, pack_text(bytes([number]) * max(size, 1)))
    replies = feed(connection, sent, pieces)
    assert [bytes(reply.view) for _, reply in replies if isinstance(reply, DataReply)] == [
        bytes([number]) * max(size, 1) for number, size in enumerate(sizes)
    ]


@given(st.binary(max_size=300))
def test_any_bytes_are_replies_or_an_error(data: bytes) -> None:
    connection = SftpConnection()
    connection.send_init()
    for kind in (Kind.READ, Kind.READDIR, Kind.STAT, Kind.EXTENDED, Kind.OPEN):
        connection.send(kind, b"x", size_bytes=100)
    try:
        feed(connection, data)
    except SftpError as error:
        assert error.brief


@pytest.mark.parametrize(
    ("kind", "body", "reply"),
    [
        (Kind.CLOSE, struct.pack(">I", 4), StatusReply(4, b"")),
        (Kind.CLOSE, struct.pack(">I", 4) + pack_text(b"x" * 1000) + pack_text(b"en"), StatusReply(4, b"x" * 200)),
    ],
)
def test_status_has_text_or_none(kind: Kind, body: bytes, reply: Reply) -> None:
    connection = SftpConnection()
    connection.send(kind, b"h")
    assert [got for _, got in feed(connection, frame(101, 0, body))] == [reply]


def test_listing_has_names_and_attributes_with_extensions() -> None:
    connection = SftpConnection()
    connection.send(Kind.READDIR, b"h")
    attributes = struct.pack(">II", 1 << 31 | 4, 0o100644) + struct.pack(">I", 1) + pack_text(b"a@b") + pack_text(b"c")
    body = struct.pack(">I", 1) + pack_text(b"\xff") + pack_text(b"long") + attributes
    ((_, reply),) = feed(connection, frame(104, 0, body))
    assert reply == NamesReply(((b"\xff", FileAttributes(mode=0o100644)),))


def test_greeting_has_extensions() -> None:
    connection = SftpConnection()
    ticket = connection.send_init()
    body = struct.pack(">BI", 2, 3) + pack_text(b"a@b") + pack_text(b"1")
    assert feed(connection, struct.pack(">I", len(body)) + body) == [(ticket, VersionReply(3, frozenset([b"a@b"])))]


def test_limits_are_within_the_clients_own() -> None:
    limits = parse_limits(memoryview(struct.pack(">4Q", 1 << 20, 1 << 30, 0, 100)))
    assert (limits.read_bytes, limits.write_bytes, limits.handles) == (CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 100)
    with pytest.raises(SftpError, match="too short"):
        parse_limits(memoryview(b"x"))


def test_room_of_a_file_system() -> None:
    room = parse_room(memoryview(struct.pack(">11Q", 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 255)))
    assert (room.free_blocks, room.files, room.free_files, room.is_read_only) == (5, 6, 8, True)


def test_ids_are_not_given_twice() -> None:
    connection = SftpConnection()
    connection.send(Kind.CLOSE, b"h")
    connection._next_id = 0xFFFFFFFF
    connection.send(Kind.CLOSE, b"h")
    connection.send(Kind.CLOSE, b"h")
    numbers = [int.from_bytes(piece[5:9], "big") for piece in connection.output]
    assert numbers == [0, 0xFFFFFFFF, 1]
