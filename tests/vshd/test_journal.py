"""The journal's connections to the collector: a socket of the test stands for systemd's."""

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.other_user import ask_as_other
from tests.vsh.live import DEADLINE_S
from vshd.syslog.journal import CONNECTIONS_MAX, JournalSource
from vshd.syslog.sockets import open_stream_socket

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


class Listening:
    """A source, and what it has read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: list[bytes] = []
        self._socket = open_stream_socket(str(path))
        self.source = JournalSource(self._socket)

    def connect(self) -> socket.socket:
        journal = socket.socket(socket.AF_UNIX)
        journal.settimeout(DEADLINE_S)
        journal.connect(str(self.path))
        return journal

    def read(self) -> list[bytes]:
        """The messages of all that waits."""
        while not self.source.read(lambda *record: self.texts.append(record[4].rpartition(b"\0")[2])):
            pass
        return self.texts

    def close(self) -> None:
        self.source.close()
        self._socket.close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    with nothing_left_open():
        made = Listening(tmp_path / "journal")
        yield made
        made.close()


def test_records_of_a_journal_and_of_the_next_one_are_read(listening: Listening) -> None:
    with listening.connect() as first, listening.connect() as second:
        first.sendall(b"MESSAGE=one\n\nMESSAGE=t")
        assert listening.read() == [b"one"]
        second.sendall(b"MESSAGE=three\n\n")
        assert listening.read() == [b"one", b"three"]
        first.sendall(b"wo\n\n")
        assert listening.read() == [b"one", b"three", b"two"]
    # What is behind the end of a connection is no record.
    with listening.connect() as third:
        third.sendall(b"MESSAGE=four\n\nMESSAGE=half")
    assert listening.read()[3:] == [b"four"]


def test_flood_is_read_in_turns(listening: Listening) -> None:
    count = 0
    with listening.connect() as journal:
        journal.setblocking(False)
        try:
            while True:
                assert journal.send(b"MESSAGE=%060d\n\n" % count) == 70
                count += 1
        except BlockingIOError:
            pass
        assert len(listening.read()) == count


def test_oldest_of_too_many_connections_is_closed(listening: Listening) -> None:
    journals = []
    for _ in range(CONNECTIONS_MAX + 1):
        journals.append(listening.connect())
        listening.read()
    assert journals[0].recv(1) == b""
    journals[-1].sendall(b"MESSAGE=last\n\n")
    assert listening.read() == [b"last"]
    for journal in journals:
        journal.close()


@needs_root
def test_user_cannot_connect(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "journal"

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))

    listening = open_stream_socket(str(path))
    assert ask_as_other(connect).startswith("PermissionError")
    listening.close()


def test_source_is_readable_while_a_connection_has_something(listening: Listening) -> None:
    poll = select.poll()
    poll.register(listening.source.fd, select.POLLIN)
    with listening.connect() as journal:
        assert poll.poll(DEADLINE_S * 1000)
        listening.read()
        assert not poll.poll(0)
        journal.sendall(b"MESSAGE=x\n\n")
        assert poll.poll(DEADLINE_S * 1000)
        assert listening.read() == [b"x"]
        assert not poll.poll(0)
