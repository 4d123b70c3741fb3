"""Copies against OpenSSH's SFTP server on a socketpair: an independent peer, which needs no machine."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from vmkit.copy.copying import Copied, copy
from vmkit.copy.endpoints import plan_copy
from vmkit.copy.items import Keep
from vmkit.copy.sides import SftpPeer

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
PLAIN = Keep()


class Peers:
    """Starts a server for each connection, whose home is `home`. argv: another program in its place."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.argv: Sequence[str] = [SFTP_SERVER]
        self.processes: list[subprocess.Popen[bytes]] = []

    def connect(self, machine: str) -> SftpPeer:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(self.argv, stdin=theirs.fileno(), stdout=theirs.fileno(), cwd=self.home)
        self.processes.append(process)
        return SftpPeer(machine or "only", ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """The home of the guest's user."""
    path = tmp_path / "guest"
    path.mkdir()
    return path


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of the host."""
    path = tmp_path / "host"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def peers(guest: Path) -> Iterator[Peers]:
    assert Path(SFTP_SERVER).exists(), "the package openssh-sftp-server is missing: make test-packages"
    started = Peers(guest)
    yield started
    started.stop()


Cp = Callable[..., Copied]


@pytest.fixture
def cp(peers: Peers, host: Path, guest: Path) -> Iterator[Cp]:
    """cp("file", "m:") as the command line. Whatever happens, no temporary file is left."""

    def run(*words: str, keep: Keep = PLAIN, into: bool = True) -> Copied:
        sources, destination = plan_copy(words)
        # Another thread opens and closes descriptors of its own. One that ends meanwhile was there at the beginning.
        is_alone = threading.active_count() == 1
        with nothing_left_open() if is_alone else nullcontext():
            return copy(sources, destination, peers.connect, keep=keep, into=into)

    yield run
    assert find_temporary(host) + find_temporary(guest) == []


def find_temporary(folder: Path) -> list[Path]:
    """The temporary files below a directory."""
    return [path for path in folder.rglob("*") if path.name.startswith(".vmkit-cp-")]


def show(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """All below a directory: kinds, modes, times in seconds, and data or targets."""
    found: dict[bytes, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        key = os.fsencode(path.relative_to(folder))
        if path.is_symlink():
            found[key] = ("link", path.readlink())
        elif path.is_dir():
            found[key] = ("directory", state.st_mode, int(state.st_mtime))
        else:
            found[key] = ("file", state.st_mode, int(state.st_mtime), path.read_bytes())
    return found
