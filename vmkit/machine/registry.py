"""The registry's writing side: reserve a name and a CID, write a machine's record, sweep what a crash left.

One directory per machine, one lock per directory: the monitor holds it for life, so whoever can share it knows that
nobody is home. An entry appears and disappears whole, by a rename from or to a name that begins with a dot. The reading
side is vsh.registry, which finds machines without knowing vmkit.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from vmkit.errors import HostError, MachineError, NameInUseError
from vmkit.machine.launch import Layout
from vmkit.machine.spec import FIRST_GUEST_CID, MAX_NAME_CHARACTERS, check_name
from vmkit.state import find_state_folder
from vsh.ending import ENDS
from vsh.registry import Entry, find_runtime_directory, read_machines

SCHEMA = 1
MACHINES = "machines"
REGISTRY_LOCK = "registry.lock"
# It is held for milliseconds; a process that was stopped while it held it must not stop all others.
REGISTRY_DEADLINE_S = 10.0
REGISTRY_POLL_S = 0.005
# Entries being made and removed: no machine's name begins with a dot.
NEW_PREFIX, OLD_PREFIX = ".new.", ".old."
# The kernel tells whether a CID is free only when asked for it (vhost); so many taken ones in a row are no accident.
MAX_CID_ATTEMPTS = 256
# A matrix gives each of its machines a name of its own.
MAX_ENDINGS = 64
# sun_path of <linux/un.h>, with its NUL; the longest name below a machine's directory is vsock.sock_4294967295.
MAX_SOCKET_PATH_BYTES = 107
LONGEST_SOCKET_NAME = f"{Layout.VSOCK}_4294967295"


@dataclass(frozen=True, slots=True)
class Reservation:
    """A name and a CID that are ours as long as lock_fd (or a copy of it) is open."""

    name: str
    cid: int
    directory: Path
    lock_fd: int


def open_runtime_directory() -> Path:
    """The runtime directory, made when it is not there. Raises VshError when it belongs to somebody else."""
    path = Path(find_runtime_directory())
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Looked at again before anything is made in it: between the first look and mkdir somebody else may have put a
        # directory of his there, or a link to one of ours.
        find_runtime_directory()
        (path / MACHINES).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make the runtime directory {path}: {error.strerror}",
            hint="set VMKIT_RUNTIME_DIR to a directory of your own",
        ) from error
    return path


def find_state_directory() -> Path:
    """Where the logs of machines that ended badly are kept, one directory per name."""
    # No HOME, and a user the host has no name for, as in containers: the logs go where the machines were.
    return find_state_folder() or Path(find_runtime_directory()) / "ended"


def write_record(directory: Path, record: Mapping[str, object]) -> None:
    """Writes machine.json so that a reader sees the old one or the new one, never a half."""
    temporary = directory / f"{Layout.RECORD}.new"
    with temporary.open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump({"schema": SCHEMA, **record}, file)
    temporary.replace(directory / Layout.RECORD)


def check_path_length(directory: Path) -> None:
    """Raises HostError when a socket in a machine's directory would have a longer path than the kernel takes."""
    longest = len(os.fsencode(directory / LONGEST_SOCKET_NAME))
    if longest > MAX_SOCKET_PATH_BYTES:
        raise HostError(
            f"the path of a machine's socket has {longest} bytes, and the kernel takes {MAX_SOCKET_PATH_BYTES}",
            details=str(directory / LONGEST_SOCKET_NAME),
            hint="set VMKIT_RUNTIME_DIR to a shorter path, or choose a shorter --name",
        )


@contextlib.contextmanager
def reserve(
    name: str | None,
    cid: int | None,
    image: str,
    record: Mapping[str, object],
    claim: Callable[[int], None] = lambda _cid: None,
) -> Iterator[Reservation]:
    """A free name and CID, locked; at the end of the block our hold on the lock goes, and with it the entry unless a
    monitor has it.

    claim is asked for the CID where the registry alone does not know which are free; it raises MachineError for one
    that is taken. Raises MachineError when the asked name or CID is in use, HostError when no entry can be made.
    """
    root = open_runtime_directory()
    with contextlib.ExitStack() as stack:
        with _hold_registry(root), _explain_errors(root):
            _sweep(root)
            entries = read_machines()
            chosen_name = _choose_name(name, image, _read_names(root))
            chosen_cid = _choose_cid(cid, entries, claim)
            directory = root / MACHINES / chosen_name
            check_path_length(directory)
            # Undone in reverse, and before anything is done: an interruption may come between any two lines.
            stack.callback(_sweep_locked, root, directory)
            full_record = {**record, "name": chosen_name, "cid": chosen_cid, "state": "starting"}
            lock_fd = stack.enter_context(_make_entry(directory, full_record))
        yield Reservation(chosen_name, chosen_cid, directory, lock_fd)


def sweep() -> None:
    """Removes the entries that nobody holds. Where there is no registry, none is made."""
    root = Path(find_runtime_directory())
    if (root / MACHINES).is_dir():
        with _hold_registry(root), _explain_errors(root):
            _sweep(root)


def write_ending(directory: Path, ending: Mapping[str, object]) -> None:
    """Leaves word of how a machine ended, for who meets that a moment later or asks for the machine's name.

    One file for each name, and of all names the last MAX_ENDINGS. A full disk loses it, and nothing else.
    """
    folder = directory.parent.parent / ENDS
    path = folder / f"{directory.name}.json"
    temporary = folder / f".{directory.name}.{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            with temporary.open("w") as file:
                os.fchmod(file.fileno(), 0o600)
                json.dump({"schema": SCHEMA, "name": directory.name, **ending}, file)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for oldest in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-MAX_ENDINGS]:
            oldest.unlink(missing_ok=True)


def discard(directory: Path) -> None:
    """Removes an entry of ours: first its name, at once, then what was in it."""
    old = directory.with_name(f"{OLD_PREFIX}{directory.name}.{os.getpid()}")
    # Left by a process of the same number that was killed here.
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        directory.rename(old)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _make_entry(directory: Path, record: Mapping[str, object]) -> Iterator[int]:
    """An entry that is whole, and locked, from the moment it can be seen; its lock is held until the block ends."""
    new = directory.with_name(NEW_PREFIX + directory.name)
    new.mkdir(mode=0o700)
    lock_fd = os.open(new / Layout.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        write_record(new, record)
        new.rename(directory)
        yield lock_fd
    finally:
        os.close(lock_fd)


def _sweep_locked(root: Path, directory: Path) -> None:
    with _hold_registry(root):
        _sweep_one(directory)
        _sweep_one(directory.with_name(NEW_PREFIX + directory.name))


def _sweep(root: Path) -> None:
    for directory in (root / MACHINES).iterdir():
        _sweep_one(directory)


def _sweep_one(directory: Path) -> None:
    """Removes one entry if its lock is free: then its monitor is gone, and QEMU with it.

    What has no lock was never an entry, and is left alone, should somebody have named a folder of theirs the runtime
    directory. The registry must be held.
    """
    if directory.name.startswith((NEW_PREFIX, OLD_PREFIX)):
        # Nobody makes an entry while we hold the registry; what is being removed may be removed by two.
        shutil.rmtree(directory, ignore_errors=True)
        return
    try:
        fd = os.open(directory / Layout.LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        # Shared: who reads the registry at this moment must not take us for a monitor.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        discard(directory)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


@contextlib.contextmanager
def _hold_registry(root: Path) -> Iterator[None]:
    """Excludes every other `up` while names and CIDs are chosen; held for milliseconds."""
    with _explain_errors(root):
        fd = os.open(root / REGISTRY_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _lock_within(fd, root / REGISTRY_LOCK, REGISTRY_DEADLINE_S)
        yield
    finally:
        os.close(fd)


def _lock_within(fd: int, path: Path, deadline_s: float) -> None:
    """flock(2) with a deadline, which it has not itself."""
    end_s = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise HostError(
                    f"another vmkit has held {path} for {deadline_s:g} s", hint="is one stopped (Ctrl-Z)? see: jobs, ps"
                ) from None
            time.sleep(REGISTRY_POLL_S)
        else:
            return


@contextlib.contextmanager
def _explain_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(
            f"cannot write to the runtime directory {root}: {error.strerror}",
            details=str(error.filename or ""),
            hint="make room there, or set VMKIT_RUNTIME_DIR to another directory of your own",
        ) from error


def _read_names(root: Path) -> set[str]:
    """Every name that is in use: those of unreadable entries and of strangers' folders, too."""
    return {path.name for path in (root / MACHINES).iterdir()}


def _choose_name(asked: str | None, image: str, taken: set[str]) -> str:
    if asked is not None:
        if asked in taken:
            raise NameInUseError(
                f"a machine named '{asked}' is running", hint=f"vmkit down {asked}, or choose another --name"
            )
        return asked
    for number in count(1):
        suffix = "" if number == 1 else f"-{number}"
        name = image[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        if name not in taken:
            return check_name(name)
    raise AssertionError("count() has no end")


def _choose_cid(asked: int | None, entries: list[Entry], claim: Callable[[int], None]) -> int:
    owners = {entry.cid: entry.name for entry in entries}
    if asked is not None:
        if asked in owners:
            raise MachineError(
                f"CID {asked} is in use by the machine '{owners[asked]}'",
                hint=f"vmkit down {owners[asked]}, or choose another --cid",
            )
        claim(asked)
        return asked
    free = (cid for cid in count(FIRST_GUEST_CID) if cid not in owners)
    for cid in islice(free, MAX_CID_ATTEMPTS):
        try:
            claim(cid)
        except MachineError:
            continue
        return cid
    raise MachineError(
        f"this host has no free CID among the {MAX_CID_ATTEMPTS} that were tried", hint="choose one with --cid"
    )
