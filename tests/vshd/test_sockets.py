"""Which paths are removed, and when: a dead socket before a bind, our own socket at the end, and nothing else ever."""

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.other_user import ask_as_other
from vshd.carry import sockets
from vshd.carry.sockets import ListeningSocket, listen_at, remove_dead

ROUNDS = 150


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def bind_dead(path: Path, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_UNIX, kind) as bound:
        bound.bind(str(path))


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices, and not in every container")


OTHERS: dict[str, Callable[[Path], object]] = {
    "a regular file": lambda path: path.write_text("precious"),
    "a directory": lambda path: path.mkdir(),
    "a FIFO": os.mkfifo,
    "a character device": make_device,
    "a symbolic link": lambda path: path.symlink_to("/nonexistent"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_file_stays_and_is_named(path: Path, kind: str) -> None:
    OTHERS[kind](path)
    before = os.lstat(path)
    with pytest.raises(OSError, match=f"the path is {kind}, not a socket"):
        listen_at(str(path), 1)
    assert os.path.samestat(os.lstat(path), before)
    assert os.listdir(path.parent) == [path.name]


def test_link_to_a_dead_socket_stays(path: Path) -> None:
    target = path.with_name("target")
    bind_dead(target)
    path.symlink_to(target)
    with pytest.raises(OSError, match="a symbolic link"):
        listen_at(str(path), 1)
    assert path.is_symlink()
    assert target.is_socket()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_dead_socket_is_replaced(path: Path, kind: int) -> None:
    bind_dead(path, kind)
    with contextlib.closing(listen_at(str(path), 1)):
        connect(path)
    assert os.listdir(path.parent) == []


@contextlib.contextmanager
def bound(path: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
        yield sock


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_socket_that_does_not_listen_yet_is_in_use(path: Path, kind: int) -> None:
    with bound(path, kind), pytest.raises(OSError, match="in use by another program"):
        listen_at(str(path), 1)
    assert path.is_socket()


def test_listener_sees_nothing_of_the_probe(path: Path) -> None:
    with bound(path) as live:
        live.listen(1)
        live.setblocking(False)
        with pytest.raises(OSError, match="in use by another program"):
            listen_at(str(path), 1)
        with pytest.raises(BlockingIOError):
            live.accept()


def test_full_backlog_is_in_use_and_not_waited_for(path: Path) -> None:
    """A blocking connect() would not come back."""
    with bound(path) as live, contextlib.ExitStack() as stack:
        live.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)):
                break
        with pytest.raises(OSError, match="in use by another program"):
            listen_at(str(path), 1)


@pytest.mark.root
def test_socket_that_cannot_be_probed_stays() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "socket")
        bind_dead(path)
        path.chmod(0o600)
        path.parent.chmod(0o777)
        answer = ask_as_other(partial(remove_dead, str(path)))
        assert "cannot tell whether the socket is in use: Permission denied" in answer
        assert path.is_socket()


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_only_the_owner_may_connect_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with contextlib.closing(listen_at(str(path), 1)):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


def test_end_removes_the_path(path: Path) -> None:
    listening = listen_at(str(path), 1)
    assert listening.is_there()
    listening.close()
    assert os.listdir(path.parent) == []


def test_end_leaves_the_socket_of_another_program(path: Path) -> None:
    listening = listen_at(str(path), 1)
    path.unlink()
    with bound(path) as other:
        other.listen()
        assert not listening.is_there()
        listening.close()
        connect(path)


def test_end_leaves_another_file(path: Path) -> None:
    listening = listen_at(str(path), 1)
    path.unlink()
    path.write_text("precious")
    assert not listening.is_there()
    listening.close()
    assert path.read_text() == "precious"


def test_end_without_the_folder_is_quiet(path: Path) -> None:
    folder = path.parent / "folder"
    folder.mkdir()
    listening = listen_at(str(folder / "socket"), 1)
    (folder / "socket").unlink()
    folder.rmdir()
    listening.close()


def test_relative_path_works(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    bind_dead(path)
    with contextlib.closing(listen_at(path.name, 1)):
        connect(path)
    assert os.listdir(path.parent) == []


def test_path_that_is_too_long_is_refused(path: Path) -> None:
    with pytest.raises(OSError, match="too long"):
        listen_at(f"{path.parent}/{'x' * 108}", 1)


def test_lock_of_another_user_is_not_waited_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "LOCK_DEADLINE_S", 0.0)
    bind_dead(path)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with contextlib.closing(listen_at(str(path), 1)):
            connect(path)
    finally:
        os.close(fd)


def test_of_many_at_one_dead_socket_one_wins_and_keeps_its_path(path: Path) -> None:
    """Without care the second removes what the first has bound meanwhile: both listen, and one is out of reach."""
    for _ in range(ROUNDS):
        bind_dead(path)
        won: list[ListeningSocket] = []
        barrier = threading.Barrier(4)

        def race(won: list[ListeningSocket] = won, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            with contextlib.suppress(OSError):
                won.append(listen_at(str(path), 1))

        threads = [threading.Thread(target=race) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [listening.is_there() for listening in won] == [True]
        connect(path)
        won[0].close()
        assert os.listdir(path.parent) == []
