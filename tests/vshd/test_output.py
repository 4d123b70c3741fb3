"""What waits for a descriptor: nothing is lost, doubled or changed under way."""

import random

from vshd.wire.buffers import BULK_SIZE, FIRST_SIZE, Buffers
from vshd.wire.output import Output


def test_output_keeps_order_through_any_partial_writes():
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
        assert written == expected


def test_kept_bytes_survive_their_buffer():
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


def test_view_of_bytes_is_not_borrowed():
    output = Output()
    output.append(memoryview(b"fixed"))
    assert not output.is_borrowing


def test_buffers_grow_and_take_turns():
    buffers = Buffers()
    assert len(buffers.current) == FIRST_SIZE
    buffers.received(FIRST_SIZE - 1)
    assert len(buffers.current) == FIRST_SIZE
    buffers.received(FIRST_SIZE)
    assert len(buffers.current) == BULK_SIZE
    first = buffers.current
    assert buffers.hold()
    second = buffers.current
    assert second is not first
    assert not buffers.hold()
    buffers.release()
    assert buffers.hold()
    assert buffers.current is first
