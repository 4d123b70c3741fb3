"""Messages of FUSE out of bytes, however these arrive."""

import struct

import pytest

from vmkit.shares.cutter import ProtocolError
from vmkit.shares.fuse import HEAD_SIZE, MESSAGE_MAX, Messages, Op, Wire


def make(opcode: int, body: bytes = b"", order: str = "<", size: int | None = None) -> bytes:
    length = HEAD_SIZE + len(body) if size is None else size
    return struct.pack(order + "IIQQIIIHH", length, opcode, 2, 1, 0, 0, 0, 0, 0) + body


def cut(stream: bytes, piece: int) -> tuple[list[bytes], str]:
    """The messages of a stream that arrives in pieces, and the byte order that was found."""
    messages, found = Messages(), []
    while stream:
        size = min(piece, len(stream), len(messages.find_room()))
        messages.find_room()[:size] = stream[:size]
        messages.received(size)
        stream = stream[size:]
        while (message := messages.take()) is not None:
            found.append(bytes(message))
    return found, messages.order


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("piece", [1, 7, 1 << 20, 1 << 22])
def test_messages_are_cut_whatever_the_pieces(order: str, piece: int) -> None:
    sent = [make(Op.INIT, bytes(64), order), make(Op.LOOKUP, b"name\0", order)]
    sent += [make(Op.WRITE, bytes(40 + size), order) for size in ((1, 1 << 12) if piece < 1 << 20 else (1 << 20,) * 5)]
    assert cut(b"".join(sent), piece) == (sent, order)


@pytest.mark.parametrize("size", [0, 39, MESSAGE_MAX + 1, (1 << 32) - 1])
def test_message_of_no_length_is_refused(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"a message has {size} bytes"):
        cut(make(Op.INIT, bytes(64)) + make(Op.LOOKUP, size=size), 1 << 20)


def test_stream_must_begin_with_init() -> None:
    with pytest.raises(ProtocolError, match="not INIT"):
        cut(make(Op.LOOKUP, b"name\0"), 1 << 20)


def test_symlink_has_its_name_before_its_target() -> None:
    request = Wire("<").parse(memoryview(make(Op.SYMLINK, b"name\0target/..\0")))
    assert request.names == (b"name", b"target/..")
