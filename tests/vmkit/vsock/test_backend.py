"""The event loop, stepped by hand: who comes when, and that nobody talks the others down."""

import socket
import tempfile
from collections.abc import Iterator

import pytest

from vmkit.vsock import vhost_user as vu
from vmkit.vsock.backend import VhostUserBackend
from vmkit.vsock.notices import Notices


class Room:
    """A device in this process, a front-end that says what a test wants, and a door for host programs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.front, back = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.backend = VhostUserBackend(back, listener, path, 3, Notices("", lambda _line: None))

    def say(self, request: int) -> None:
        self.front.sendall(vu.HEADER.pack(request, 1, 0))


@pytest.fixture
def room() -> Iterator[Room]:
    with tempfile.TemporaryDirectory(prefix="vsock-") as name:
        room = Room(f"{name}/v")
        yield room
        room.front.close()
        room.backend.close()


def test_front_end_that_talks_without_pause_keeps_no_program_waiting(room: Room) -> None:
    programs = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for program in programs:
        program.connect(room.path)
        program.sendall(b"nonsense\n")
    for _ in range(10):
        room.say(vu.GET_FEATURES)
    for _ in range(5):
        room.backend.step()
        assert len(room.front.recv(1000)) == vu.HEADER.size + 8
    for program in programs:
        program.setblocking(False)
        with pytest.raises(ConnectionResetError):
            program.recv(1)
        program.close()
