"""The loop of SFTP over a socket pair: bulk, back-pressure, and every way in which a connection ends."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vshd import sftp_peer as sftp
from tests.vshd.service_thread import serve_in_thread
from tests.vshd.sftp_peer import NO_ATTRIBUTES, Answer, text, u32, u64
from vshd.carry.conduit import LEAVING_CAPACITY, SPLICE_SIZE
from vshd.services.sftp.packets import DATA_MAX, PACKET_MAX
from vshd.services.sftp.serving import SftpService

READ, WRITE, CREAT = 1, 2, 8
INIT = u32(5) + bytes([sftp.INIT]) + u32(3)


class Served:
    """A running service. `end` is its last word."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.end = ""
        self._next = 0

    def send(self, kind: int, *fields: bytes) -> int:
        """Sends a request, and returns its id."""
        self._next += 1
        self.client.sendall(self.render(self._next, kind, *fields))
        return self._next

    @staticmethod
    def render(ident: int, kind: int, *fields: bytes) -> bytes:
        body = b"".join(fields)
        return u32(5 + len(body)) + bytes([kind]) + u32(ident) + body

    def receive(self) -> Answer:
        size = int.from_bytes(self._receive(4), "big")
        return Answer(self._receive(size))

    def _receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.client.recv(size - len(data))
            assert piece, "the service has ended"
            data += piece
        return data

    def open(self, path: Path, flags: int) -> bytes:
        self.send(sftp.OPEN, text(os.fsencode(path)), u32(flags), NO_ATTRIBUTES)
        answer = self.receive()
        assert answer.kind == sftp.HANDLE
        return text(answer.text())


@contextlib.contextmanager
def serving(rest: bytes = INIT, capacity: int = LEAVING_CAPACITY) -> Iterator[Served]:
    ours, theirs = socket.socketpair()
    served = Served(ours)
    with serve_in_thread(lambda: SftpService(b"/", capacity=capacity), served, theirs, rest):
        if rest == INIT:
            assert served.receive().kind == sftp.VERSION
        yield served


# Beside a page's end, below and above what is spliced, and the largest.
SIZES = (1, 4095, SPLICE_SIZE - 1, SPLICE_SIZE, SPLICE_SIZE + 1, DATA_MAX)


def test_reads_of_any_size_bring_the_files_bytes(tmp_path: Path) -> None:
    data = os.urandom(3 * DATA_MAX)
    (tmp_path / "f").write_bytes(data)
    with serving() as served:
        handle = served.open(tmp_path / "f", READ)
        for size in SIZES:
            for offset in (0, 1, 4096, len(data) - size, len(data) - size // 2 - 1):
                served.send(sftp.READ, handle, u64(offset), u32(size))
                assert served.receive().text() == data[offset : offset + size], (offset, size)
        served.send(sftp.READ, handle, u64(len(data)), u32(DATA_MAX))
        assert served.receive().status()[0] == 1
    assert served.end.startswith("ended, 33 requests")


def test_read_that_brings_less_than_the_file_promised_has_the_right_length(tmp_path: Path) -> None:
    """As of a file that shrinks meanwhile: here the pipe is too small for what was promised."""
    data = os.urandom(DATA_MAX)
    (tmp_path / "f").write_bytes(data)
    with serving(capacity=1 << 16) as served:
        handle = served.open(tmp_path / "f", READ)
        found = b""
        while len(found) < len(data):
            served.send(sftp.READ, handle, u64(len(found)), u32(DATA_MAX))
            piece = served.receive().text()
            assert piece
            found += piece
        assert found == data


def test_requests_in_flight_are_answered_in_order(tmp_path: Path) -> None:
    """Many reads, large and small, whose answers wait for a slow reader; and writes between them."""
    data = os.urandom(4 * DATA_MAX)
    (tmp_path / "f").write_bytes(data)
    wanted: list[bytes | None] = []
    with serving() as served:
        source, sink = served.open(tmp_path / "f", READ), served.open(tmp_path / "g", WRITE | CREAT)
        for number in range(60):
            size, offset = (DATA_MAX, 5_000, 70_000)[number % 3], number * 1000
            served.send(sftp.READ, source, u64(offset), u32(size))
            wanted.append(data[offset : offset + size])
            if number % 10 == 0:
                served.send(sftp.WRITE, sink, u64(number), text(b"0123456789"))
                wanted.append(None)
        for want in wanted:
            answer = served.receive()
            assert (answer.text() if answer.kind == sftp.DATA else None) == want
    assert (tmp_path / "g").read_bytes() == b"0123456789" * 6


def test_client_may_send_many_small_requests_before_it_reads(tmp_path: Path) -> None:
    """More answers than the sockets hold, to a client that only then reads."""
    count = 45_000
    ask = b"".join(Served.render(number, sftp.STAT, text(b"/")) for number in range(count))
    with serving() as served:
        served.client.sendall(ask)
        assert [served.receive().ident for _ in range(count)] == list(range(count))


def test_large_writes_arrive_whole(tmp_path: Path) -> None:
    data = os.urandom(8 * DATA_MAX + 7)
    with serving() as served:
        handle = served.open(tmp_path / "f", WRITE | CREAT)
        for offset in range(0, len(data), DATA_MAX):
            served.send(sftp.WRITE, handle, u64(offset), text(data[offset : offset + DATA_MAX]))
        assert [served.receive().status()[0] for _ in range(9)] == [0] * 9
    assert (tmp_path / "f").read_bytes() == data
    assert served.end.endswith(f"0 bytes read, {len(data)} bytes written")


def test_request_behind_the_handshake_is_answered() -> None:
    stat = u32(10) + bytes([sftp.STAT]) + u32(7) + text(b"/")
    with serving(INIT + stat) as served:
        assert [served.receive().kind for _ in range(2)] == [sftp.VERSION, sftp.ATTRS]


def test_answers_before_nonsense_are_sent() -> None:
    with serving() as served:
        served.client.sendall(served.render(1, sftp.STAT, text(b"/")) + u32(PACKET_MAX + 1))
        assert served.receive().kind == sftp.ATTRS
        assert served.client.recv(1) == b""
    assert served.end.startswith(f"ended: the client sent a packet of {PACKET_MAX + 1} bytes, 2 requests")


@pytest.mark.parametrize("nonsense", [b"GET / HTTP/1.1\r\n\r\n", bytes(64), u32(1) + b"\x01", u32(4) + bytes(4)])
def test_what_is_no_packet_ends_the_connection(nonsense: bytes) -> None:
    with serving(b"") as served:
        served.client.sendall(nonsense)
        with contextlib.suppress(ConnectionResetError):
            assert served.client.recv(1) == b""
    assert served.end.startswith("ended: the client sent ")


def test_client_that_leaves_with_answers_unread_ends_the_service(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(DATA_MAX))
    with serving() as served:
        handle = served.open(tmp_path / "f", READ)
        for _ in range(20):
            served.send(sftp.READ, handle, u64(0), u32(DATA_MAX))
        served.client.close()
    assert served.end.startswith("ended: ")


@pytest.mark.parametrize("is_stuck", [False, True], ids=["idle", "stuck"])
def test_signal_ends_the_service(tmp_path: Path, is_stuck: bool) -> None:
    """Whether it waits for a request, or for a client that reads nothing."""
    (tmp_path / "f").write_bytes(bytes(DATA_MAX))
    with serving() as served:
        handle = served.open(tmp_path / "f", READ)
        for _ in range(10 * is_stuck):
            served.send(sftp.READ, handle, u64(0), u32(DATA_MAX))
        os.kill(os.getpid(), signal.SIGTERM)
        # Requests that it has not read make its close a reset.
        with contextlib.suppress(ConnectionResetError):
            while served.client.recv(1 << 16):
                pass
    assert served.end.startswith("vshd is shutting down")


def test_open_files_are_closed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with nothing_left_open(), serving() as served:
        for _ in range(5):
            served.open(tmp_path / "f", READ)
        served.send(sftp.OPENDIR, text(os.fsencode(tmp_path)))
        assert served.receive().kind == sftp.HANDLE
