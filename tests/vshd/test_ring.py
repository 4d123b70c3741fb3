"""The output that a lasting session keeps: the last bytes of both streams, at offsets that never change."""

import os
import random
from pathlib import Path

import pytest

from vshd.lasting.ring import MARKS_MAX, FileStore, MemoryStore, Ring
from vshd.wire.messages import STDERR, STDOUT


def read_all(ring: Ring, offset: int, size: int = 1 << 20) -> list[tuple[int, bytes]]:
    """What a client gets from `offset` on, with neighbouring pieces of a stream joined."""
    pieces: list[tuple[int, bytes]] = []
    while offset < ring.end:
        stream, data = ring.read(offset, size)
        assert data
        offset += len(data)
        if pieces and pieces[-1][0] == stream:
            pieces[-1] = (stream, pieces[-1][1] + data)
        else:
            pieces.append((stream, data))
    return pieces


def make_store(kind: str, folder: Path, size: int) -> MemoryStore | FileStore:
    return MemoryStore(size) if kind == "memory" else FileStore(os.fsencode(folder / "output"), size)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_ring_keeps_the_last_bytes_of_both_streams(kind: str, tmp_path: Path) -> None:
    rng = random.Random(3)
    ring = Ring(make_store(kind, tmp_path, 1000))
    said: list[tuple[int, int]] = []
    for _ in range(400):
        stream, data = rng.choice((STDOUT, STDOUT, STDERR)), rng.randbytes(rng.randrange(1, 90))
        ring.append(stream, memoryview(data))
        said += [(stream, byte) for byte in data]
        assert ring.end == len(said)
        assert ring.start == max(0, ring.end - 1000)
        since = rng.randrange(ring.start, ring.end)
        got = [(stream, byte) for stream, data in read_all(ring, since, rng.choice((1, 50, 5000))) for byte in data]
        assert got == said[since:]
    ring.store.close()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_piece_larger_than_the_ring_leaves_its_end(kind: str, tmp_path: Path) -> None:
    ring = Ring(make_store(kind, tmp_path, 10))
    ring.append(STDERR, memoryview(b"before"))
    ring.append(STDOUT, memoryview(b"0123456789abcdef"))
    assert (ring.start, ring.end) == (12, 22)
    assert read_all(ring, 12) == [(STDOUT, b"6789abcdef")]
    ring.store.close()


def test_streams_that_alternate_take_no_memory_without_end() -> None:
    ring = Ring(MemoryStore(1 << 20))
    for index in range(3 * MARKS_MAX):
        ring.append((STDOUT, STDERR)[index % 2], memoryview(b"x"))
    assert ring.start == ring.end - MARKS_MAX
    assert ring.read(ring.end - 1, 1) == (STDERR, b"x")


def test_ring_stops_growing_where_memory_is_short() -> None:
    is_short = False
    ring = Ring(MemoryStore(8 << 20, lambda: not is_short))
    piece = memoryview(os.urandom(1 << 16))
    for _ in range(40):
        ring.append(STDOUT, piece)
    assert (ring.start, ring.end) == (0, 40 << 16)
    is_short = True
    for _ in range(40):
        ring.append(STDOUT, piece)
    # It had room for 3 MiB when it looked again.
    assert ring.size == 3 << 20
    assert ring.start == ring.end - ring.size
    assert read_all(ring, ring.start) == [(STDOUT, bytes(piece) * 48)]


def test_output_that_the_file_does_not_take_is_dropped_and_counted() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    store = FileStore.__new__(FileStore)
    store.size, store._fd = 1000, fd
    ring = Ring(store)
    ring.append(STDOUT, memoryview(b"lost"))
    assert (ring.start, ring.end) == (4, 4)
    store.close()


def test_file_is_made_anew_and_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "output"
    store = FileStore(os.fsencode(path), 1000)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        FileStore(os.fsencode(path), 1000)
    store.close()
