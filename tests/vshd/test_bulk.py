"""Bulk that a driver takes from the transport itself: the protocol only counts it, and comes to the same."""

import random

import pytest

from tests.vshd.joined import Joined
from vshd.wire import messages
from vshd.wire.connection import MAX_DATA, WINDOW
from vshd.wire.errors import LocalProtocolError
from vshd.wire.events import Broken, Data, EndOfStream
from vshd.wire.frames import BULK_MIN, encode_data_head
from vshd.wire.server import ServerConnection


def take_all(server: ServerConnection, data: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
    """What the server gets of stdin out of `data`, some of it past receive_data(), and its other events."""
    got, names, position = b"", [], 0
    while position < len(data):
        room = server.bulk_room(messages.STDIN)
        if room and rng.random() < 0.8:
            size = min(rng.randrange(1, room + 1), len(data) - position)
            server.took(messages.STDIN, size)
            got += data[position : position + size]
            server.consumed(messages.STDIN, size)
        else:
            size = server.bulk_head_size or rng.choice((1, 13, 4096, 1 << 18))
            for event in server.receive_data(data[position : position + size]):
                if isinstance(event, Data):
                    got += event.data
                    server.consumed(messages.STDIN, len(event.data))
                else:
                    names.append(type(event).__name__)
        position += size
    return got, names


def test_bulk_is_the_same_taken_or_received() -> None:
    rng = random.Random(11)
    passed = 0
    for _ in range(30):
        joined = Joined().establish()
        expected = b""
        for _ in range(rng.randrange(1, 12)):
            data = rng.randbytes(rng.choice((1, 4000, BULK_MIN - 1, BULK_MIN, 100_000, MAX_DATA)))
            if joined.client.send_room(messages.STDIN) < len(data):
                break
            joined.client.send_data(messages.STDIN, data)
            expected += data
            if rng.random() < 0.3:
                joined.client.send_signal(2)
        got, _ = take_all(joined.server, joined.client.output.take(), rng)
        assert got == expected
        passed += joined.server.bulk_head_size > 0
        # The accounts are the same as well.
        receiver = joined.server.receiving[messages.STDIN]
        assert receiver.allowance is not None
        assert receiver.allowance + receiver.consumed == WINDOW
        joined.client.send_end(messages.STDIN)
        assert take_all(joined.server, joined.client.output.take(), rng) == (b"", [EndOfStream.__name__])
    assert passed


def test_only_large_frames_are_worth_reading_a_head_alone() -> None:
    joined = Joined().establish()
    for size, is_bulk in ((BULK_MIN - 1, False), (BULK_MIN, True)):
        head = encode_data_head(messages.STDIN, size)
        assert joined.server.receive_data(head) == []
        assert (joined.server.bulk_room(messages.STDIN) == size) is is_bulk
        # In the middle of a large frame there is no next head to look for.
        assert joined.server.bulk_head_size == (0 if is_bulk else BULK_MIN)
        joined.server.receive_data(bytes(size))
        assert joined.server.bulk_head_size == (len(head) if is_bulk else BULK_MIN)
        assert joined.server.bulk_room(messages.STDIN) == 0


@pytest.mark.parametrize("scrap", [1, 4080, BULK_MIN - 1])
def test_scrap_between_large_frames_does_not_bring_them_into_memory(scrap: int) -> None:
    """What the credit left is a small frame; of the large one behind it at most a small frame's worth is received."""
    joined = Joined().establish()
    joined.client.send_data(messages.STDIN, bytes(MAX_DATA))
    joined.client.send_data(messages.STDIN, bytes(scrap))
    joined.client.send_data(messages.STDIN, bytes(MAX_DATA))
    data, position, received = joined.client.output.take(), 0, 0
    while position < len(data):
        size = joined.server.bulk_room(messages.STDIN)
        if size:
            joined.server.took(messages.STDIN, size)
        else:
            size = min(joined.server.bulk_head_size, len(data) - position)
            joined.server.receive_data(data[position : position + size])
            received += size
        position += size
    # The first of these reads comes before anything is known.
    assert received < 4 * BULK_MIN


def test_head_of_another_kind_is_received_as_ever() -> None:
    """The guess of what comes next is wrong: its first bytes are kept until the rest is there."""
    joined = Joined().establish()
    joined.server.receive_data(encode_data_head(messages.STDIN, BULK_MIN))
    joined.server.took(messages.STDIN, BULK_MIN)
    size = joined.server.bulk_head_size
    joined.client.send_data(messages.STDIN, b"small" * 10)
    joined.client.send_end(messages.STDIN)
    data = joined.client.output.take()
    assert joined.server.bulk_room(messages.STDIN) == 0
    events = joined.server.receive_data(data[:size])
    events += joined.server.receive_data(data[size:])
    assert b"".join(event.data for event in events if isinstance(event, Data)) == b"small" * 10
    assert isinstance(events[-1], EndOfStream)


def test_bulk_beyond_the_credit_is_not_taken() -> None:
    """What the peer had no credit for must be found, not carried."""
    joined = Joined().establish()
    for _ in range(WINDOW // MAX_DATA):
        joined.server.receive_data(encode_data_head(messages.STDIN, MAX_DATA))
        joined.server.took(messages.STDIN, MAX_DATA)
    joined.server.receive_data(encode_data_head(messages.STDIN, MAX_DATA))
    assert joined.server.bulk_room(messages.STDIN) == 0
    (event,) = joined.server.receive_data(b"x")
    assert isinstance(event, Broken)
    assert event.reason == "data without credit"


def test_bulk_for_a_stream_that_is_closed_or_ended_is_received_and_dropped() -> None:
    joined = Joined().establish()
    joined.server.receive_data(encode_data_head(messages.STDIN, BULK_MIN) + b"first")
    assert joined.server.bulk_room(messages.STDIN) == BULK_MIN - 5
    joined.server.close_stream(messages.STDIN)
    assert joined.server.bulk_room(messages.STDIN) == 0
    assert joined.server.receive_data(bytes(BULK_MIN - 5)) == []


def test_frame_of_a_drivers_own_data_counts_like_any_other() -> None:
    """The head is what send_data() would have written, and the credit is spent."""
    joined = Joined().establish()
    data = bytes(range(250)) * 80
    before = joined.server.send_room(messages.STDOUT)
    head = joined.server.begin_data(messages.STDOUT, len(data))
    assert joined.server.send_room(messages.STDOUT) == before - len(data)
    (event,) = joined.client.receive_data(head + data)
    assert isinstance(event, Data)
    assert (event.stream, bytes(event.data)) == (messages.STDOUT, data)
    for size in (MAX_DATA + 1, joined.server.send_room(messages.STDOUT) + 1):
        with pytest.raises(LocalProtocolError):
            joined.server.begin_data(messages.STDOUT, size)
