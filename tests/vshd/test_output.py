"""What waits for a descriptor: nothing is lost, doubled or changed under way."""

import random

from vshd.wire.buffers import BULK_SIZE, FIRST_SIZE, HELD_MAX, Buffers
from vshd.wire.output import Output


def test_output_keeps_order_through_any_partial_writes() -> None:
    rng = random.Random(3)
    for _ in range(200):
        output, expected, written = Output(), b"", b""
        for _ in range(rng.randrange(1, 100)):
            data = rng.randbytes(rng.randrange(1, 40))
            expected += data
            output.append(data if rng.random() < 0.5 else memoryview(bytearray(data)))
        while output.size:
            joined = b"".join(output.buffers())
            size = rng.randrange(len(joined) + 1)
            written += joined[:size]
            output.sent(size)
            if rng.random() < 0.3:
                output.keep()
            if rng.random() < 0.3:
                output.join()
        assert written == expected


def test_joined_bytes_leave_at_once() -> None:
    output = Output()
    for _ in range(1000):
        output.append(b"ab")
    output.join()
    assert b"".join(output.buffers()) == b"ab" * 1000
    output.append(memoryview(bytearray(b"c")))
    output.join()
    assert output.is_borrowing
    assert output.size == 2001


def test_kept_bytes_survive_their_buffer() -> None:
    buffer = bytearray(b"first")
    output = Output()
    output.append(b"own ")
    output.append(memoryview(buffer))
    output.append(b" end")
    assert output.is_borrowing
    output.keep()
    buffer[:] = b"XXXXX"
    assert not output.is_borrowing
    assert output.take() == b"own first end"


def test_view_of_bytes_is_not_borrowed() -> None:
    output = Output()
    output.append(memoryview(b"fixed"))
    assert not output.is_borrowing


def test_buffers_grow() -> None:
    buffers = Buffers()
    assert len(buffers.current) == FIRST_SIZE
    buffers.received(FIRST_SIZE - 1)
    assert len(buffers.current) == FIRST_SIZE
    buffers.received(FIRST_SIZE)
    assert len(buffers.current) == BULK_SIZE


def test_a_window_of_bulk_waits_where_it_was_received() -> None:
    buffers, output = Buffers(), Output()
    buffers.received(FIRST_SIZE)
    first = buffers.current
    for _ in range(HELD_MAX):
        output.append(buffers.current)
        buffers.secure(output)
        assert len(buffers.current) == BULK_SIZE
    assert output.is_borrowing
    # What has gone gives its buffer back, and the others stay.
    output.sent(BULK_SIZE + 1)
    output.append(buffers.current)
    buffers.secure(output)
    assert buffers.current is first
    assert output.is_borrowing


def test_buffers_survive_any_receiving_and_sending() -> None:
    rng = random.Random(5)
    for _ in range(100):
        buffers, outputs = Buffers(), (Output(), Output())
        expected, written = [b"", b""], [b"", b""]
        for _ in range(rng.randrange(1, 60)):
            size = rng.randrange(1, FIRST_SIZE)
            data = rng.randbytes(size)
            buffers.current[:size] = data
            index = rng.randrange(2)
            outputs[index].append(buffers.current[:size])
            expected[index] += data
            buffers.secure(*outputs)
            for which, output in enumerate(outputs):
                joined = b"".join(output.buffers())
                gone = rng.randrange(len(joined) + 1) if rng.random() < 0.7 else 0
                written[which] += joined[:gone]
                output.sent(gone)
        assert [done + output.take() for done, output in zip(written, outputs, strict=True)] == expected
