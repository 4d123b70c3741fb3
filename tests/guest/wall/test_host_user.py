"""Another user of the host: on `user`, files and their modes are all there is between that user and a guest."""

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.wall.ledger import LEDGER
from vmkit.machine.launch import Layout
from vsh.registry import find_machine

NOBODY = 65534


@pytest.fixture
def directory(ready: str) -> Path:
    machine = find_machine(name=ready)
    assert machine is not None
    return Path(machine.directory)


@pytest.fixture
def open_folders(directory: Path, folders: Path) -> Iterator[None]:
    """Every folder above the machine's files lets everybody through: what is left are the files' own modes."""
    changed = [directory, directory.parent, folders / "runtime", folders]
    modes = [path.stat().st_mode for path in changed]
    for path in changed:
        path.chmod(0o755)
    yield
    for path, mode in zip(changed, modes, strict=True):
        path.chmod(stat.S_IMODE(mode))


@pytest.mark.root
def test_other_host_user_gets_nothing(directory: Path) -> None:
    results = try_all(directory)
    assert set(results.values()) == {"PermissionError"}, results


@pytest.mark.root
def test_other_host_user_gets_nothing_even_where_the_folders_are_open(directory: Path, open_folders: None) -> None:
    sockets = {name: result for name, result in try_all(directory).items() if name.endswith(" connect")}
    assert sockets
    assert set(sockets.values()) == {"PermissionError"}, sockets


def test_sockets_and_folders_are_their_owners_alone(directory: Path, folders: Path) -> None:
    for path in (directory, directory.parent, folders / "runtime"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    sockets = [path for path in directory.iterdir() if path.is_socket()]
    assert Layout.VSOCK in {path.name for path in sockets}
    for path in sockets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def try_all(directory: Path) -> dict[str, str]:
    """What `nobody` gets of each file of the machine: an exception's name, or `done`."""
    names = sorted(path.name for path in directory.iterdir())
    sockets = {path.name for path in directory.iterdir() if path.is_socket()}
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        results: dict[str, str] = {
            f"{name} read": tell(lambda path: path.open("rb").close(), directory / name) for name in names
        }
        results |= {f"{name} connect": tell(connect, directory / name) for name in sockets}
        results["list"] = tell(lambda path: list(path.iterdir()), directory)
        results["make"] = tell(lambda path: (path / "mine").touch(), directory)
        os.write(writing, json.dumps(results).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        results = json.load(pipe)
    os.waitpid(pid, 0)
    intrusions = sum(result == "done" for name, result in results.items() if "connect" in name)
    LEDGER.add("another user of the host, backend user", len(results), intrusions)
    return results


def tell(step: Callable[[Path], object], path: Path) -> str:
    try:
        step(path)
    except OSError as error:
        return type(error).__name__
    return "done"


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
