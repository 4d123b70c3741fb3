"""The loop that carries bytes between sockets: bulk through conduits, whole, bounded, and with nothing left behind."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from vshd.carry.bridge import BUFFER_SIZE, CONDUITS_MAX, Pairs, Side

TURN_S = 0.05


def open_files() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def carrying(count: int = 1) -> Iterator[tuple[Pairs, list[tuple[socket.socket, socket.socket]]]]:
    """`count` pairs, as their outer ends (left, right), and the loop; nothing of them is left."""
    before = open_files()
    pairs = Pairs()
    ends = []
    for _ in range(count):
        left, inner_left = socket.socketpair()
        inner_right, right = socket.socketpair()
        pairs.add(Side(inner_left.detach()), Side(inner_right.detach()))
        left.setblocking(False)
        right.setblocking(False)
        ends.append((left, right))
    yield pairs, ends
    pairs.close()
    for left, right in ends:
        left.close()
        right.close()
    assert open_files() == before


def connect_tcp() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection within this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def push(sender: socket.socket, data: bytes) -> int:
    """How much of `data` goes now."""
    with contextlib.suppress(BlockingIOError):
        return sender.send(data)
    return 0


def pull(receiver: socket.socket) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return receiver.recv(1 << 20)
    return b""


def carry(pairs: Pairs, sender: socket.socket, receiver: socket.socket, data: bytes) -> bytes:
    """Sends all of `data` and returns what arrives."""
    received, sent = b"", 0
    while len(received) < len(data):
        sent += push(sender, data[sent : sent + (1 << 18)])
        pairs.turn(TURN_S)
        received += pull(receiver)
    return received


def test_bulk_is_whole_both_ways_and_small_talk_in_between() -> None:
    with carrying() as (pairs, [(left, right)]):
        for size in (10, 3_000_000, 5, 1, 700_000, 100):
            data = os.urandom(size)
            assert carry(pairs, left, right, data) == data
            assert carry(pairs, right, left, data) == data


def test_bulk_takes_the_way_through_a_conduit() -> None:
    """What is read into memory is the first of it, and what is small; recv(), the test's own, is not counted."""

    def find_read_size() -> int:
        return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])

    with carrying() as (pairs, [(left, right)]):
        before = find_read_size()
        carry(pairs, left, right, bytes(20_000_000))
        assert find_read_size() - before < 2_000_000


def test_receiver_that_stalls_is_waited_for_and_gets_all() -> None:
    data = os.urandom(4 << 20)
    with carrying() as (pairs, [(left, right)]):
        sent = 0
        for _ in range(200):
            sent += push(left, data[sent : sent + (1 << 18)])
            pairs.turn(0.001)
        # Two socket buffers and one conduit's worth; the rest is still the sender's.
        assert 2 * BUFFER_SIZE < sent < 6 * BUFFER_SIZE
        received = b""
        while len(received) < len(data):
            received += pull(right)
            sent += push(left, data[sent : sent + (1 << 18)])
            pairs.turn(0.001)
        assert received == data


def test_many_stalled_receivers_share_few_conduits() -> None:
    """Everyone has a rest that waits; descriptors stay few, and all of it arrives."""
    count = CONDUITS_MAX + 5
    with carrying(count) as (pairs, ends):
        sent = [0] * count
        before = len(open_files())
        data = os.urandom(1 << 20)
        for _ in range(40):
            for index, (left, _) in enumerate(ends):
                sent[index] += push(left, data[sent[index] : sent[index] + (1 << 18)])
            pairs.turn(0.001)
        used = (len(open_files()) - before) // 2
        assert 2 < used <= CONDUITS_MAX
        for index, (left, right) in enumerate(ends):
            received = b""
            while len(received) < len(data):
                received += pull(right)
                sent[index] += push(left, data[sent[index] : sent[index] + (1 << 18)])
                pairs.turn(0.001)
            assert received == data


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_side_that_goes_with_a_conduit_full_leaves_nothing(who: str) -> None:
    with carrying() as (pairs, [(left, right)]):
        for _ in range(50):
            push(left, bytes(1 << 18))
            pairs.turn(0.001)
        (left if who == "sender" else right).close()
        if who == "sender":
            # What it said before it went is delivered, then the end.
            size = 0
            while True:
                try:
                    data = right.recv(1 << 20)
                except BlockingIOError:
                    pairs.turn(TURN_S)
                    continue
                if not data:
                    break
                size += len(data)
            assert size > BUFFER_SIZE
        for _ in range(5):
            pairs.turn(0.001)


def test_half_close_behind_bulk_comes_after_it() -> None:
    with carrying() as (pairs, [(left, right)]):
        data = os.urandom(1_000_000)
        received, sent = b"", 0
        while sent < len(data):
            sent += push(left, data[sent : sent + (1 << 18)])
            pairs.turn(0.001)
            received += pull(right)
        left.shutdown(socket.SHUT_WR)
        while True:
            pairs.turn(TURN_S)
            try:
                more = right.recv(1 << 20)
            except BlockingIOError:
                continue
            if not more:
                break
            received += more
        assert received == data
        assert carry(pairs, right, left, b"still here") == b"still here"


@pytest.mark.parametrize("is_end_behind", [False, True], ids=["alone", "end behind"])
def test_urgent_data_in_bulk_is_stepped_over(is_end_behind: bool) -> None:
    """TCP's splice(2) stops before it: with nothing, again and again; once the end has come, as if it were there."""
    left, inner = connect_tcp()
    inner_right, right = socket.socketpair()
    right.setblocking(False)
    pairs = Pairs()
    pair = pairs.add(Side(inner.detach()), Side(inner_right.detach()))
    with left, right:
        # All is there before the first turn.
        data = os.urandom(9000)
        left.sendall(data[:5000])
        left.send(b"!", socket.MSG_OOB)
        left.sendall(data[5000:])
        if is_end_behind:
            left.shutdown(socket.SHUT_WR)
        received, turns = b"", 0
        while len(received) < len(data) and turns < 20:
            turns += 1
            if turns < 3:
                # As if bulk had come before.
                pair.ways[0].is_bulk = True
            pairs.turn(TURN_S)
            received += pull(right)
        assert received == data
    pairs.close()


def test_where_there_is_no_conduit_one_look_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each piece of bulk, for as long as the connection lasts."""
    looks = []
    monkeypatch.setattr("vshd.carry.bridge.open_conduit", lambda _capacity: looks.append(1))
    with carrying(2) as (pairs, ends):
        data = os.urandom(5_000_000)
        for left, right in ends:
            assert carry(pairs, left, right, data) == data
    assert len(looks) == 2


def test_file_that_cannot_be_spliced_to_is_written(tmp_path: Path) -> None:
    """vsh --proxy with stdout a file that appends."""
    before = open_files()
    path = tmp_path / "log"

    class Appending(Side):
        def __init__(self, reading: int, writing: int) -> None:
            self.reading, self.writing = reading, writing

        def end(self) -> None:
            pass

        def stop(self) -> None:
            pass

        def close(self, *, is_reset: bool = False) -> None:
            os.close(self.reading)
            os.close(self.writing)

    left, inner = socket.socketpair()
    left.setblocking(False)
    silent = os.pipe2(os.O_NONBLOCK)
    data = os.urandom(2_000_000)
    pairs = Pairs()
    pairs.add(Side(inner.detach()), Appending(silent[0], os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)))
    sent = 0
    while sent < len(data) or path.stat().st_size < len(data):
        sent += push(left, data[sent : sent + (1 << 18)])
        pairs.turn(TURN_S)
    assert path.read_bytes() == data
    pairs.close()
    left.close()
    os.close(silent[1])
    assert open_files() == before
