"""Files in and out of a machine for programs: one path to one path, by the engine of `vmkit cp`."""

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from vmkit.copy.calls import AnswerError, do, start_channel
from vmkit.copy.copying import copy
from vmkit.copy.endpoints import Endpoint
from vmkit.copy.engine import Channel, Engine, Step
from vmkit.copy.sides import SILENCE_S, SftpPeer
from vmkit.copy.wire import FileAttributes, Kind, pack_attributes
from vmkit.errors import ConfigError, MachineError
from vmkit.machine.sftp import connect_sftp
from vsh.registry import Entry

# What directories and files of a copy in the making may not lack, for their removal.
OWN_BITS = 0o700
# Of a directory for any user's programs.
FOLDER_MODE = 0o755


def push(entry: Entry, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str) -> None:
    """Copies to the guest's path `destination`, which is the copy's own. Raises VshError kinds."""
    _copy(entry, Endpoint(None, _name(source)), Endpoint(entry.name, _name(destination)), user)


def pull(entry: Entry, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str) -> None:
    """Copies to the path `destination` of this host, where the copy appears whole. Raises VshError kinds."""
    target = Path(destination)
    if target.is_dir() and not target.is_symlink():
        raise ConfigError(f"cannot pull to {destination}: it is a directory", hint="name the path of the copy itself")
    try:
        work = Path(tempfile.mkdtemp(prefix=".vmkit-pull-", dir=target.absolute().parent))
    except OSError as error:
        raise ConfigError(f"cannot pull to {destination}: {error.strerror}") from error
    try:
        whole = work / "copy"
        _copy(entry, Endpoint(entry.name, _name(source)), Endpoint(None, os.fsencode(whole)), user)
        _move(whole, target)
    except OSError as error:
        raise MachineError(f"cannot pull {source} to {destination}: {error.strerror}") from error
    finally:
        _remove(work)


def make_folders(entry: Entry, path: str) -> None:
    """Makes a directory of the guest, and those above it, as vshd's default user. One that is there is no error.

    What cannot be made is not reported: who uses the directory next is told. Raises VshError kinds where the guest does
    not answer.
    """
    engine = Engine()
    peer = connect_sftp(entry, "")
    with peer.sock:
        channel = engine.open_channel(peer.sock, peer.label)
        engine.push([(0, lambda: _make_folders(channel, os.fsencode(path)))])
        engine.run(SILENCE_S)


def _make_folders(channel: Channel, path: bytes) -> Step[None]:
    yield from start_channel(channel)
    words = [word for word in path.split(b"/") if word]
    for count in range(1, len(words) + 1):
        with contextlib.suppress(AnswerError):
            name = b"/" + b"/".join(words[:count])
            yield from do(channel, Kind.MKDIR, name, tail=pack_attributes(FileAttributes(mode=FOLDER_MODE)))


def _copy(entry: Entry, source: Endpoint, destination: Endpoint, user: str) -> None:
    def connect(_machine: str) -> SftpPeer:
        return connect_sftp(entry, user)

    copy([source], destination, connect, into=False)


def _name(path: str | os.PathLike[str]) -> bytes:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in os.fspath(path):
        raise ConfigError(f"{path!r} is no path")
    return os.fsencode(path).rstrip(b"/") or b"/"


def _move(whole: Path, target: Path) -> None:
    """Gives a copy its place. A directory that may not be written to cannot be moved, but by root."""
    mode = stat.S_IMODE(whole.lstat().st_mode)
    if whole.is_dir() and not whole.is_symlink():
        whole.chmod(mode | OWN_BITS)
        whole.replace(target)
        target.chmod(mode)
    else:
        whole.replace(target)


def _remove(work: Path) -> None:
    """Removes what an error has left, also below directories that may not be written to."""
    for folder, _, _ in os.walk(work):
        with contextlib.suppress(OSError):
            Path(folder).chmod(OWN_BITS)
    shutil.rmtree(work, ignore_errors=True)
