"""The stored machines of this user: makes, finds, locks and removes them.

A machine is a folder with a lock. Who starts, changes or removes the machine holds the lock, and a monitor holds it for
as long as its machine runs. Folders appear and disappear whole, by a rename from or to a name that begins with a dot.
"""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.entries.entry import NEW_PREFIX, OLD_PREFIX, NewEntry, discard, make_entry, sweep_one
from vmkit.entries.folder import lock_within
from vmkit.errors import HostError, MachineError, NameInUseError
from vmkit.state import check_own_folder
from vmkit.stored.place import KIND, VARIABLE, find_machines_folder, find_present_folder, list_names
from vmkit.stored.record import MAX_RECORD_BYTES, StoredRecord, parse_record, render_record
from vsh.registry import LOCK, is_held

RECORD = "stored.json"
DISK = "disk.qcow2"
STORE_LOCK = "machines.lock"
DEADLINE_S = 10.0
LOOKERS_S = 0.5
LOOKERS_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored machine in its folder. record: None where it cannot be read, and why."""

    name: str
    folder: Path
    record: StoredRecord | None
    trouble: str = ""

    @property
    def disk(self) -> Path:
        return self.folder / DISK

    @property
    def is_held(self) -> bool:
        """Whether it runs, or another program starts or removes it."""
        with contextlib.suppress(OSError):
            return is_held(self.folder / LOCK)
        return False

    def measure(self) -> int:
        """The bytes of this host's disk that are the machine's alone."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                status = path.stat()
                total += status.st_blocks * 512 if status.st_nlink == 1 else 0
        return total

    def require_record(self) -> StoredRecord:
        """The record. Raises MachineError."""
        if self.record is None:
            raise MachineError(
                f"the record of the machine '{self.name}' is damaged: {self.trouble}",
                details=str(self.folder / RECORD),
                hint=f"its disk is {self.disk}; vmkit rm {self.name} removes the machine with its disk",
            )
        return self.record


def read_stored(name: str) -> Stored:
    """A stored machine by its name. Raises MachineError where there is none, HostError."""
    folder = find_machines_folder()
    if name not in list_names():
        raise MachineError(f"there is no stored machine '{name}'", hint="vmkit list --all shows those there are")
    return _read(folder / name)


def read_all_stored() -> list[Stored]:
    """All of them, by their names. Raises HostError."""
    return [_read(find_machines_folder() / name) for name in list_names()]


def _read(folder: Path) -> Stored:
    try:
        with (folder / RECORD).open("rb") as file:
            record = parse_record(file.read(MAX_RECORD_BYTES))
        if record.name != folder.name:
            raise ValueError(f"it is the record of '{record.name}'")
    except OSError as error:
        return Stored(folder.name, folder, None, f"cannot read it: {error.strerror}")
    except ValueError as error:
        return Stored(folder.name, folder, None, str(error))
    return Stored(folder.name, folder, record)


class NewMachine:
    """A machine that no other program sees yet. `folder` is for its files."""

    def __init__(self, entry: NewEntry) -> None:
        self._entry = entry
        self.record: StoredRecord | None = None

    @property
    def folder(self) -> Path:
        return self._entry.directory


@contextlib.contextmanager
def make_stored(name: str) -> Iterator[NewMachine]:
    """A new machine, which appears at the end of the block with the record that the block gave it.

    Nothing is left when the block raises; what a killed program leaves is swept later. Raises NameInUseError for a name
    that is taken, HostError.
    """
    folder = find_machines_folder()
    with _explain_errors(folder), contextlib.ExitStack() as stack:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_own_folder(folder, KIND, VARIABLE)
        with _hold(folder):
            _sweep(folder)
            _require_free(folder, name)
            try:
                entry = stack.enter_context(make_entry(folder, name))
            except FileExistsError as error:
                raise NameInUseError(
                    f"another program creates the machine '{name}' now", hint="wait for it, or choose another name"
                ) from error
        new = NewMachine(entry)
        try:
            yield new
            assert new.record is not None, "the block gives one"
            _write_record(new.folder, new.record)
            with _hold(folder):
                _require_free(folder, name)
                entry.publish(name)
            _sync(folder)
        except BaseException:
            discard(entry.directory)
            raise


def require_free(name: str) -> None:
    """Raises NameInUseError for a name that a stored machine has. make_stored() looks again."""
    _require_free(find_machines_folder(), name)


def _require_free(folder: Path, name: str) -> None:
    if (folder / name).exists():
        raise NameInUseError(
            f"there is a stored machine '{name}' already",
            hint=f"vmkit up {name} starts it; vmkit rm {name} removes it with its disk",
        )


@contextlib.contextmanager
def lock_stored(stored: Stored) -> Iterator[int]:
    """Holds a machine. Yields the descriptor of the lock, which is held as long as it, or a copy of it, is open.

    Raises MachineError where another program holds it, or where the machine is gone.
    """
    try:
        fd = os.open(stored.folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _explain_gone(stored) from error
    try:
        if not _try_lock(fd):
            raise MachineError(
                f"the machine '{stored.name}' is running",
                details="Or another program starts or removes it at this moment.",
                hint=f"vmkit down {stored.name}",
            )
        # Between opening and locking it can have been removed, and another one of its name been made.
        try:
            is_same = os.path.samestat(os.fstat(fd), os.stat(stored.folder / LOCK))  # noqa: PTH116
        except OSError:
            is_same = False
        if not is_same:
            raise _explain_gone(stored)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    """Takes a lock. A program that looks whether it is held, holds it for a moment itself."""
    end_s = time.monotonic() + LOOKERS_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(LOOKERS_POLL_S)
        else:
            return True


def remove_stored(name: str) -> None:
    """Removes a machine with its disk. Raises MachineError where it runs, or where there is none; HostError.

    A folder that is a link elsewhere loses its name here, and its files stay.
    """
    stored = read_stored(name)
    with _explain_errors(stored.folder), contextlib.ExitStack() as stack:
        if (stored.folder / LOCK).exists():
            stack.enter_context(lock_stored(stored))
        with _hold(stored.folder.parent):
            old = stored.folder.with_name(f"{OLD_PREFIX}{name}.{os.getpid()}")
            # Left by a process of the same number that was killed here.
            _remove_old(old)
            stored.folder.rename(old)
            _remove_old(old)


def sweep_stored() -> None:
    """Removes what killed programs left. Raises HostError."""
    folder = find_present_folder()
    if folder is not None:
        check_own_folder(folder, KIND, VARIABLE)
        with _explain_errors(folder), _hold(folder):
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """The caller holds the store. A machine's own folder stays: its lock is free whenever the machine does not run."""
    for path in folder.iterdir():
        if path.name.startswith(OLD_PREFIX):
            _remove_old(path)
        elif path.name.startswith(NEW_PREFIX):
            sweep_one(path)


def _remove_old(path: Path) -> None:
    """What is left is swept later."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Excludes every other program that makes, shows or removes a machine. Raises HostError at its deadline."""
    path = folder / f".{STORE_LOCK}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        lock_within(fd, path, DEADLINE_S)
        yield
    finally:
        os.close(fd)


def _write_record(folder: Path, record: StoredRecord) -> None:
    path = folder / RECORD
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(render_record(record))
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain_gone(stored: Stored) -> MachineError:
    return MachineError(
        f"there is no stored machine '{stored.name}' any more", hint="vmkit list --all shows those there are"
    )


@contextlib.contextmanager
def _explain_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write to the data folder {folder}: {error.strerror}",
            details=str(error.filename or ""),
            hint=f"make room there, or name another one: {VARIABLE}=DIR",
        ) from error
