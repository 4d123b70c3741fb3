"""A second user of the same host: reaches nothing of a machine, and leads vmkit into no directory of his making."""

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.other_user import SOMEBODY_ELSE, ask_as_other
from tests.vmkit.machine.conftest import Boot
from vmkit.entries import folder
from vmkit.entries.folder import open_runtime_directory
from vmkit.machine.registry import find_state_directory
from vsh.errors import VshError
from vsh.registry import find_runtime_directory

OPEN_TO_OTHERS = 0o077


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


@pytest.fixture
def no_umask() -> Iterator[None]:
    old = os.umask(0)
    yield
    os.umask(old)


@pytest.mark.usefixtures("no_umask")
def test_nothing_of_a_machine_is_open_to_others_whatever_the_umask(boot: Boot, folders: Path) -> None:
    machine = boot("ready")
    modes = {str(path): path.lstat().st_mode for path in (folders / "runtime").rglob("*")}
    assert str(machine.directory / "monitor.sock") in modes
    assert not {path: oct(mode) for path, mode in modes.items() if mode & OPEN_TO_OTHERS}


@pytest.mark.root
def test_other_user_reaches_no_socket_of_a_machine(boot: Boot, folders: Path) -> None:
    machine = boot("ready")
    folders.chmod(0o755)
    sockets = [path for path in machine.directory.iterdir() if path.is_socket()]
    assert {path.name for path in sockets} >= {"vsock.sock", "vsock.sock_7777", "monitor.sock", "console.sock"}
    for path in sockets:
        assert ask_as_other(partial(connect, path)).startswith("PermissionError: ")
    assert ask_as_other(lambda: os.listdir(folders / "runtime")).startswith("PermissionError: ")
    # Not by the directories alone: should somebody open them, the sockets are still their owner's.
    for directory in (folders / "runtime", folders / "runtime" / "machines", machine.directory):
        directory.chmod(0o755)
    for path in sockets:
        assert ask_as_other(partial(connect, path)).startswith("PermissionError: ")
    for directory in (folders / "runtime", folders / "runtime" / "machines", machine.directory):
        directory.chmod(0o700)


@pytest.mark.root
def test_directory_that_another_user_made_first_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.chmod(0o755)
    (folders / "tmp").mkdir()
    (folders / "tmp").chmod(0o1777)
    squat = folders / "tmp" / "vmkit-0"
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(squat))
    assert ask_as_other(lambda: squat.mkdir(mode=0o700)) == "None"
    with pytest.raises(VshError, match=f"belongs to uid {SOMEBODY_ELSE}, not to you"):
        open_runtime_directory()
    assert list(squat.iterdir()) == []


def test_link_that_comes_between_the_look_and_the_making_leads_nowhere(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user wins the race for the name, with a link to a directory that only we may write to."""
    precious = folders / "precious"
    precious.mkdir(mode=0o700)
    squat = folders / "vmkit-0"
    monkeypatch.setenv("VMKIT_RUNTIME_DIR", str(squat))
    look = find_runtime_directory

    def look_too_early() -> str:
        path = look()
        if not squat.is_symlink():
            squat.symlink_to(precious)
        return path

    monkeypatch.setattr(folder, "find_runtime_directory", look_too_early)
    with pytest.raises(VshError, match="is not a directory"):
        open_runtime_directory()
    assert list(precious.iterdir()) == []


def test_logs_that_are_kept_are_their_owners(boot: Boot) -> None:
    boot("ready-then-die", name="m").monitor.wait(20)
    kept = find_state_directory() / "m"
    assert (kept / "events.jsonl").exists()
    assert kept.stat().st_mode & OPEN_TO_OTHERS == 0
