"""An entry: a directory with a record and a lock, for one thing that lives, such as a machine or a forward.

The process that keeps the thing holds the lock for life, so a process that gets the lock knows that the entry is stale.
An entry appears and disappears whole, by a rename from or to a name that begins with a dot. vsh.registry reads entries.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vmkit.errors import HostError
from vsh.registry import LOCK, MAX_RECORD_BYTES, is_held

Item = TypeVar("Item")

# Entries being made and removed: no thing's name begins with a dot.
NEW_PREFIX, OLD_PREFIX = ".new.", ".old."


class NewEntry:
    """An entry of ours. Invariant: `directory` is its present path. The lock is held as long as `lock_fd`, or a copy
    of it, is open.
    """

    def __init__(self, directory: Path, lock_fd: int) -> None:
        self.directory = directory
        self.lock_fd = lock_fd

    def publish(self, name: str) -> None:
        """Shows the entry to others under `name`. The caller holds the registry.

        Raises OSError when an entry has that name already.
        """
        target = self.directory.with_name(name)
        self.directory.rename(target)
        self.directory = target


@contextlib.contextmanager
def make_entry(folder: Path, name: str) -> Iterator[NewEntry]:
    """Makes an entry that others do not see before publish(). The end of the block releases our hold on the lock.

    name: its name until then, behind NEW_PREFIX. Raises OSError.
    """
    new = folder / f"{NEW_PREFIX}{name}"
    new.mkdir(mode=0o700)
    try:
        lock_fd = os.open(new / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        new.rmdir()
        raise
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield NewEntry(new, lock_fd)
    finally:
        os.close(lock_fd)


def write_record(path: Path, record: Mapping[str, object]) -> None:
    """Writes a JSON file so that a reader sees the whole old file or the whole new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump(record, file)
    temporary.replace(path)


def read_entries(folder: Path, record: str, parse: Callable[[Any, Path], tuple[str, Item]]) -> list[Item]:
    """Every thing of a folder that lives, by the name of its entry. Raises HostError.

    record: the file's name. parse: returns the name that the record has, and the thing, from the record's JSON and the
    entry's directory; ValueError, KeyError and TypeError mean that it is no such thing.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {folder}: {error.strerror}") from error
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if is_held(folder / name / LOCK):
                with (folder / name / record).open("rb") as file:
                    said, item = parse(json.loads(file.read(MAX_RECORD_BYTES)), folder / name)
                # A copied directory is not the thing that it names.
                if said == name:
                    found.append(item)
    return found


def discard(directory: Path) -> None:
    """Removes an entry of ours: first its name, at once, then its files."""
    old = directory.with_name(f"{OLD_PREFIX}{directory.name}.{os.getpid()}")
    # Left by a process of the same number that was killed here.
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def sweep_all(folder: Path) -> None:
    """Removes every stale entry of a folder. The caller holds the registry."""
    for directory in folder.iterdir():
        sweep_one(directory)


def sweep_one(directory: Path) -> None:
    """Removes one entry if its lock is free: the process that kept it is gone. The caller holds the registry.

    A directory without a lock was never an entry, and stays: a user may have chosen a folder with other files as the
    runtime directory.
    """
    is_new = directory.name.startswith(NEW_PREFIX)
    if directory.name.startswith(OLD_PREFIX):
        # Two may remove what is being removed.
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        fd = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if is_new:
            # No program makes an entry while we hold the registry: its maker was killed before it made the lock.
            shutil.rmtree(directory, ignore_errors=True)
        return
    except OSError:
        # A lock that we cannot look at may be held.
        return
    try:
        # Shared: a program that reads the registry at this moment must not take us for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        discard(directory)
    finally:
        os.close(fd)
