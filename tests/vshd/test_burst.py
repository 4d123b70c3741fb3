"""What a reader takes from a producer that writes one small piece after each read: the two are in lock step."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vshd.carry.burst import PIECES_MAX, PIECES_MIN, BurstReader
from vshd.carry.conduit import open_sluice, write_output
from vshd.wire.output import Output

PIECE = 4096


class Producer:
    """Writes `rested` bytes whenever its reader rests, and a piece when it is told to."""

    def __init__(self, rested: int) -> None:
        self.fd, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.rested = rested
        self.rests = 0

    def write(self, size: int = PIECE) -> None:
        os.write(self._writing, bytes(size))

    def rest(self) -> None:
        self.rests += 1
        self.write(self.rested)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._writing)


@pytest.fixture
def producer() -> Iterator[Producer]:
    producer = Producer(10 * PIECE)
    yield producer
    producer.close()


@pytest.mark.parametrize("way", ["read", "fill"])
def test_reader_rests_after_some_small_pieces_and_takes_what_came_meanwhile(producer: Producer, way: str) -> None:
    reader = BurstReader(producer.rest)
    sluice, output = open_sluice(), Output()
    if sluice is None:
        pytest.skip("this kernel's splice(2) is not worth it")
    sizes = []
    with Path(os.devnull).open("wb") as sink:
        for _ in range(2 * PIECES_MIN):
            producer.write()
            if way == "read":
                sizes.append(reader.read(producer.fd, memoryview(bytearray(1 << 16))))
                continue
            sizes.append(reader.fill(sluice, producer.fd, 1 << 16))
            sluice.append_to(output, b"head")
            while output.size:
                write_output(output, sink.fileno())
    sluice.close()
    assert sizes == ([PIECE] * (PIECES_MIN - 1) + [11 * PIECE]) * 2


@pytest.mark.parametrize("size", [100, 1 << 14], ids=["small", "bulk"])
def test_reader_does_not_rest_while_another_size_comes_between(producer: Producer, size: int) -> None:
    reader = BurstReader(producer.rest)
    for number in range(4 * PIECES_MIN):
        producer.write(size if number % PIECES_MIN == 0 else PIECE)
        assert reader.read(producer.fd, memoryview(bytearray(1 << 16)))
    assert producer.rests == 0


def test_reader_does_not_rest_once_its_chunk_is_full(producer: Producer) -> None:
    reader = BurstReader(producer.rest)
    for _ in range(4 * PIECES_MIN):
        producer.write()
        assert reader.read(producer.fd, memoryview(bytearray(PIECE))) == PIECE
    assert producer.rests == 0


def test_rest_that_brings_nothing_makes_the_next_one_rarer(producer: Producer) -> None:
    """A producer that waits for an answer to each piece gets it late once in 64 times."""
    producer.rested = 0
    reader = BurstReader(producer.rest)
    rests = []
    for _ in range(4 * PIECES_MAX):
        producer.write()
        assert reader.read(producer.fd, memoryview(bytearray(1 << 16))) == PIECE
        rests.append(producer.rests)
    first = [rests.index(number) + 1 for number in range(1, rests[-1] + 1)]
    assert first == [4, 12, 28, 60, 124, 188, 252]


def test_piece_that_a_rest_was_for_is_not_lost_at_the_end(producer: Producer) -> None:
    """The producer ends during the rest."""
    reader = BurstReader(lambda: os.close(producer._writing))
    for _ in range(PIECES_MIN):
        producer.write()
        assert reader.read(producer.fd, memoryview(bytearray(1 << 16))) == PIECE
    assert reader.read(producer.fd, memoryview(bytearray(1 << 16))) == 0
    producer._writing = os.open("/dev/null", os.O_RDONLY)
