"""The READY message: whole, in pieces, never; from the guest, from its users, from strangers; a flood of anything."""

import asyncio
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from vmkit.errors import MachineError
from vmkit.monitor import ready
from vmkit.monitor.ready import (
    MAX_WRONG_MESSAGES,
    ReadyListener,
    is_ready_message,
    parse_facts,
    parse_wall,
    parse_wall_text,
)
from vsh.text import MAX_LINE_CHARACTERS

# Far longer than anything here takes.
DEADLINE_S = 10.0


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vmkit-") as folder:
        yield Path(folder) / "ready"


class VsockLike(socket.socket):
    """A UNIX listener whose callers have the vsock addresses that a test gives them, in order."""

    peers: list[object]

    def accept(self) -> tuple[socket.socket, object]:
        connection, _ = super().accept()
        return connection, self.peers.pop(0) if self.peers else ""


def listen(path: Path, *, cid: int | None = None, peers: Sequence[object] = ()) -> ReadyListener:
    sock = VsockLike(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.peers = list(peers)
    sock.bind(str(path))
    sock.listen(128)
    return ReadyListener(sock, 7777, cid)


def call(path: Path, *messages: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(path))
    for message in messages:
        sock.sendall(message)
    return sock


def run(listener: ReadyListener, callers: Callable[[], Awaitable[None]] | None = None) -> None:
    """Waits for READY while callers call; raises TimeoutError when it does not come."""

    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            both: list[asyncio.Future[None] | asyncio.Task[bytes]] = [asyncio.create_task(listener.wait())]
            if callers is not None:
                both.append(asyncio.ensure_future(callers()))
            await asyncio.gather(*both)

    try:
        asyncio.run(main())
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("message", "is_ready"),
    [
        (b"READY=1\n", True),
        (b"READY=1", True),
        (b"STATUS=up\nREADY=1\nMAINPID=3\n", True),
        (b"READY=0\n", False),
        (b"READY=10\n", False),
        (b"XREADY=1\n", False),
        (b"ready=1\n", False),
        (b"READY=1\r\n", False),
        (b"", False),
        (b"\0\xff", False),
    ],
)
def test_ready_is_one_line_of_the_message(message: bytes, is_ready: bool) -> None:
    assert is_ready_message(message) is is_ready


@pytest.mark.parametrize(
    ("message", "wall"),
    [
        (b"READY=1\n", {}),
        (b"WALL_TRANSPORT=on\nWALL_DAEMON=off\nREADY=1\n", {"transport": "on", "daemon": "off"}),
        (b"READY=1\nWALL_KERNEL=missing: a=b\n", {"kernel": "missing: a=b"}),
        (b"WALL_KERNEL\nWALL_MOAT=on\nwall_daemon=on\nXWALL_DAEMON=on\nWALL_\xff=on\nREADY=1\n", {}),
        (b"WALL_KERNEL=\x1b]0;title\x07o\x1b[31mn\r\t\xff\n", {"kernel": "on \N{REPLACEMENT CHARACTER}"}),
        (b"WALL_KERNEL=" + b"x" * 4000, {"kernel": "x" * (MAX_LINE_CHARACTERS - 4) + " ..."}),
    ],
)
def test_states_of_the_wall_are_told_with_it(message: bytes, wall: dict[str, str]) -> None:
    assert parse_wall(message) == wall


def test_message_in_one_piece_is_heard_before_the_caller_closes(path: Path) -> None:
    listener = listen(path)
    with call(path, b"READY=1\n"):
        run(listener)


def test_message_byte_by_byte_is_heard(path: Path) -> None:
    listener = listen(path)

    async def callers() -> None:
        with call(path) as sock:
            for byte in b"STATUS=almost\nREADY=1\n":
                sock.sendall(bytes([byte]))
                await asyncio.sleep(0)

    run(listener, callers)


def test_message_without_a_newline_is_heard_at_its_end(path: Path) -> None:
    listener = listen(path)
    call(path, b"READY=1").close()
    run(listener)


def test_garbage_is_dropped_and_ready_still_heard(path: Path) -> None:
    listener = listen(path)
    for garbage in (b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"READY=2\n"):
        call(path, garbage).close()
    with call(path, b"READY=1\n"):
        run(listener)


def test_endless_message_is_cut_off(path: Path) -> None:
    listener = listen(path)
    with call(path, b"x" * (ready.MAX_MESSAGE_BYTES * 2)), call(path, b"READY=1\n"):
        run(listener)


def test_caller_that_says_nothing_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "MESSAGE_DEADLINE_S", 0.05)
    listener = listen(path)
    with call(path), call(path, b"STATUS=still"), call(path, b"READY=1\n"):
        run(listener)


def test_caller_that_breaks_off_is_dropped(path: Path) -> None:
    listener = listen(path)
    call(path, b"REA").close()
    with call(path, b"READY=1\n"):
        run(listener)


def test_flood_of_garbage_ends_the_start_with_its_cause(path: Path) -> None:
    listener = listen(path)
    for _ in range(MAX_WRONG_MESSAGES):
        call(path, b"NO\n").close()
    with pytest.raises(MachineError, match="floods the ready port"):
        run(listener)


@pytest.mark.parametrize(
    "peer",
    [(4, 1), (2, 1), (0, 0), (2**32 - 1, 1), (3, 1024), (3, 65535), (3, 2**32 - 1), "", None, b"3"],
)
def test_stranger_is_not_believed(path: Path, peer: object) -> None:
    listener = listen(path, cid=3, peers=[peer, (3, 1023)])
    with call(path, b"READY=1\n") as stranger, call(path, b"READY=1\n"):
        run(listener)
        # Closed with what it said unread.
        with pytest.raises(ConnectionResetError):
            stranger.recv(1)


def test_guests_root_is_believed(path: Path) -> None:
    listener = listen(path, cid=3, peers=[(3, 1)])
    with call(path, b"READY=1\n"):
        run(listener)


def test_flood_of_strangers_ends_nobodys_start(path: Path) -> None:
    count = MAX_WRONG_MESSAGES + 10
    listener = listen(path, cid=3, peers=[(9, 1)] * count + [(3, 7)])
    for _ in range(count):
        call(path, b"READY=1\n").close()
    with call(path, b"READY=1\n"):
        run(listener)


def test_descriptors_are_given_back(path: Path) -> None:
    with nothing_left_open():
        listener = listen(path, cid=3, peers=[(9, 1), (3, 5), (3, 5)])
        for message in (b"x", b"y", b"READY=1\n"):
            call(path, message).close()
        run(listener)


def test_wall_of_a_thaw_is_one_line() -> None:
    text = "WALL_TRANSPORT=on WALL_DAEMON=missing: vshd also serves CID 7 WALL_KERNEL=off"
    wall = {"transport": "on", "daemon": "missing: vshd also serves CID 7", "kernel": "off"}
    assert parse_wall_text(text) == {"wall": wall}
    assert parse_wall_text("") == {}


def test_init_of_the_root_is_told_beside_the_wall() -> None:
    assert parse_facts(b"WALL_KERNEL=on\nINIT=systemd\nREADY=1\n") == {"wall": {"kernel": "on"}, "init": "systemd"}
    assert parse_facts(b"INIT=\x1b[31m\nREADY=1\n") == {}
