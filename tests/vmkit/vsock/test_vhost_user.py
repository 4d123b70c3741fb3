"""Messages of the front-end: whole, in pieces, with and without descriptors, and broken."""

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.descriptors import nothing_left_open
from vmkit.vsock import vhost_user as vu
from vmkit.vsock.memory import RegionSpec


def render(request: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return vu.HEADER.pack(request, flags, len(payload)) + payload


def feed(decoder: vu.Decoder, data: bytes, step: int) -> list[vu.VhostUserMessage]:
    """As a socket would give it: never more than is wanted."""
    messages = []
    while data:
        size = min(step, decoder.wanted_bytes())
        message = decoder.feed(data[:size], [])
        data = data[size:]
        if message is not None:
            messages.append(message)
    return messages


@pytest.mark.parametrize("step", [1, 5, 12, 1000])
def test_messages_come_out_of_any_pieces(step: int) -> None:
    data = render(1) + render(9, bytes(40), flags=9) + render(3)
    messages = feed(vu.Decoder(), data, step)
    assert [(m.request, len(m.payload), m.needs_reply) for m in messages] == [
        (1, 0, False),
        (9, 40, True),
        (3, 0, False),
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (vu.HEADER.pack(1, 0, 0), "flags"),
        (vu.HEADER.pack(1, 2, 0), "flags"),
        (vu.HEADER.pack(1, 5, 0), "flags"),
        (vu.HEADER.pack(1, 1, vu.MAX_PAYLOAD_BYTES + 1), "bytes"),
        (vu.HEADER.pack(1, 1, 2**32 - 1), "bytes"),
    ],
)
def test_broken_headers_are_refused(data: bytes, text: str) -> None:
    with pytest.raises(vu.VhostUserError, match=text):
        feed(vu.Decoder(), data, 12)


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_are_messages_or_an_error(data: bytes, step: int) -> None:
    try:
        messages = feed(vu.Decoder(), data, step)
    except vu.VhostUserError:
        return
    assert sum(vu.HEADER.size + len(m.payload) for m in messages) <= len(data)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_descriptors_stay_with_their_message(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fd = os.eventfd(0)
    theirs.sendall(render(vu.SET_OWNER))
    socket.send_fds(theirs, [render(vu.SET_VRING_KICK, bytes(8))], [fd])
    theirs.sendall(render(vu.SET_OWNER))
    decoder = vu.Decoder()
    counts = []
    while (message := vu.receive_message(ours, decoder)) is not None:
        counts.append((message.request, len(message.fds)))
        if message.fds:
            taken = message.take_fd()
            assert is_open(taken) and not os.get_inheritable(taken)
            os.close(taken)
        message.close()
    assert counts == [(3, 0), (12, 1), (3, 0)]
    os.close(fd)


def test_descriptors_that_nobody_took_are_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fd = os.eventfd(0)
    socket.send_fds(theirs, [render(vu.SET_MEM_TABLE, bytes(8))], [fd, fd])
    message = vu.receive_message(ours, vu.Decoder())
    assert message is not None
    fds = list(message.fds)
    assert len(fds) == 2 and all(map(is_open, fds))
    with pytest.raises(vu.RefusedMessageError, match="2 descriptors"):
        message.take_fd()
    message.close()
    assert not any(map(is_open, fds))
    os.close(fd)


def test_message_without_its_descriptor_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(render(vu.SET_VRING_KICK, bytes(8)))
    message = vu.receive_message(ours, vu.Decoder())
    assert message is not None
    with pytest.raises(vu.RefusedMessageError, match="0 descriptors"):
        message.take_fd()


def test_too_many_descriptors_are_refused_and_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fd = os.eventfd(0)
    with nothing_left_open():
        socket.send_fds(theirs, [render(vu.SET_MEM_TABLE, bytes(8))], [fd] * (vu.MAX_FDS + 1))
        decoder = vu.Decoder()
        with pytest.raises(vu.VhostUserError, match="descriptors"):
            vu.receive_message(ours, decoder)
        decoder.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("sent", "error"), [(b"", EOFError), (b"\1", vu.VhostUserError), (render(9, bytes(40))[:-1], vu.VhostUserError)]
)
def test_end_of_stream_is_clean_only_between_messages(
    pair: tuple[socket.socket, socket.socket], sent: bytes, error: type[Exception]
) -> None:
    ours, theirs = pair
    theirs.sendall(sent)
    decoder = vu.Decoder()
    assert vu.receive_message(ours, decoder) is None
    theirs.close()
    with pytest.raises(error):
        vu.receive_message(ours, decoder)


def test_payloads_are_parsed() -> None:
    assert vu.parse_u64(struct.pack("<Q", 2**40)) == 2**40
    assert vu.parse_vring_state(struct.pack("<II", 1, 128)) == (1, 128)
    # On the wire: index, flags, descriptors, used, available, log.
    assert vu.parse_vring_address(struct.pack("<IIQQQQ", 1, 0, 10, 20, 30, 40)) == vu.VringAddress(1, 10, 30, 20)
    assert vu.parse_vring_fd(struct.pack("<Q", 1)) == (1, True)
    assert vu.parse_vring_fd(struct.pack("<Q", 0x101)) == (1, False)
    table = struct.pack("<IIQQQQ", 1, 0, 1, 2, 3, 4)
    assert vu.parse_memory_table(table) == [RegionSpec(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("parse", "payload"),
    [
        (vu.parse_u64, bytes(7)),
        (vu.parse_vring_state, bytes(7)),
        (vu.parse_vring_address, bytes(39)),
        (vu.parse_memory_table, bytes(7)),
        (vu.parse_memory_table, struct.pack("<II", 1, 0) + bytes(31)),
        (vu.parse_memory_table, struct.pack("<II", 9, 0) + bytes(32 * 9)),
        (lambda payload: vu.render_config_reply(payload, b""), bytes(11)),
        (lambda payload: vu.render_config_reply(payload, b""), struct.pack("<III", 0, 5000, 0)),
    ],
)
def test_short_or_absurd_payloads_are_refused(parse: Callable[[bytes], object], payload: bytes) -> None:
    with pytest.raises(vu.RefusedMessageError):
        parse(payload)


@pytest.mark.parametrize(
    ("offset", "size", "data"),
    [(0, 8, b"\3\0\0\0\0\0\0\0"), (0, 4, b"\3\0\0\0"), (4, 8, bytes(8)), (100, 2, bytes(2)), (0, 0, b"")],
)
def test_configuration_is_the_cid_and_zeros(offset: int, size: int, data: bytes) -> None:
    request = struct.pack("<III", offset, size, 0) + bytes(size)
    assert vu.render_config_reply(request, struct.pack("<Q", 3)) == struct.pack("<III", offset, size, 0) + data


def test_reply_is_marked_as_one() -> None:
    assert vu.render_reply(11, vu.render_vring_state(1, 77)) == struct.pack("<IIIII", 11, 5, 8, 1, 77)
