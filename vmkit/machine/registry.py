"""The registry's writing side: reserve a name and a CID, write a machine's record, sweep what a crash left.

One directory per machine, one lock per directory: the monitor holds it for life, so whoever can take it knows that
nobody is home. The reading side is vsh.registry, which finds machines without knowing vmkit.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import HostError, MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.spec import FIRST_GUEST_CID, LAST_GUEST_CID, check_name
from vsh.registry import Machine as Entry
from vsh.registry import find_runtime_directory, read_machines

SCHEMA = 1
MACHINES = "machines"
REGISTRY_LOCK = "registry.lock"
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
        (path / MACHINES).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make the runtime directory {path}: {error.strerror}",
            hint="set VMKIT_RUNTIME_DIR to a directory of your own",
        ) from error
    # Looked at again: between the first look and mkdir somebody else may have made it.
    return Path(find_runtime_directory())


def find_state_directory() -> Path:
    """Where the logs of machines that ended badly are kept, one directory per name."""
    base = os.environ.get("VMKIT_STATE_DIR")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vmkit"


def write_record(directory: Path, record: Mapping[str, object]) -> None:
    """Writes machine.json so that a reader sees the old one or the new one, never a half."""
    temporary = directory / f"{Layout.RECORD}.new"
    with temporary.open("w") as file:
        os.fchmod(file.fileno(), 0o600)
        json.dump({"schema": SCHEMA, **record}, file)
    temporary.replace(directory / Layout.RECORD)


@contextlib.contextmanager
def reserve(name: str | None, cid: int | None, image: str, record: Mapping[str, object]) -> Iterator[Reservation]:
    """A free name and CID, locked; at the end of the block our hold on the lock goes, and with it the entry unless a
    monitor has it.

    Raises MachineError when the asked name or CID is in use, or no path short enough can be had.
    """
    root = open_runtime_directory()
    with contextlib.ExitStack() as stack:
        with _hold_registry(root):
            _sweep(root)
            entries = read_machines()
            chosen_name = _choose_name(name, image, entries)
            chosen_cid = _choose_cid(cid, entries)
            directory = root / MACHINES / chosen_name
            _check_path_length(directory)
            # Undone in reverse, and before anything is done: an interruption may come between any two lines.
            stack.callback(_sweep_locked, root, directory)
            directory.mkdir(mode=0o700)
            lock_fd = os.open(directory / Layout.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock_fd)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_record(directory, {**record, "name": chosen_name, "cid": chosen_cid, "state": "starting"})
        yield Reservation(chosen_name, chosen_cid, directory, lock_fd)


def sweep() -> None:
    """Removes the entries that nobody holds."""
    root = open_runtime_directory()
    with _hold_registry(root):
        _sweep(root)


def _sweep_locked(root: Path, directory: Path) -> None:
    with _hold_registry(root):
        _sweep_one(directory)


def _sweep(root: Path) -> None:
    for directory in (root / MACHINES).iterdir():
        _sweep_one(directory)


def _sweep_one(directory: Path) -> None:
    """Removes one entry if its lock can be taken: then its monitor is gone, and QEMU with it."""
    try:
        fd = os.open(directory / Layout.LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        shutil.rmtree(directory, ignore_errors=True)
        return
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


@contextlib.contextmanager
def _hold_registry(root: Path) -> Iterator[None]:
    """Excludes every other `up` while names and CIDs are chosen; held for milliseconds."""
    fd = os.open(root / REGISTRY_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _choose_name(asked: str | None, image: str, entries: list[Entry]) -> str:
    taken = {entry.name for entry in entries}
    if asked is not None:
        if asked in taken:
            raise MachineError(
                f"a machine named '{asked}' is running", hint=f"vmkit down {asked}, or choose another --name"
            )
        return asked
    name, number = image, 1
    while name in taken:
        number += 1
        name = f"{image}-{number}"
    return check_name(name)


def _choose_cid(asked: int | None, entries: list[Entry]) -> int:
    owners = {entry.cid: entry.name for entry in entries}
    if asked is not None:
        if asked in owners:
            raise MachineError(
                f"CID {asked} is in use by the machine '{owners[asked]}'",
                hint=f"vmkit down {owners[asked]}, or choose another --cid",
            )
        return asked
    return next(cid for cid in range(FIRST_GUEST_CID, LAST_GUEST_CID + 1) if cid not in owners)


def _check_path_length(directory: Path) -> None:
    longest = len(os.fsencode(directory / LONGEST_SOCKET_NAME))
    if longest > MAX_SOCKET_PATH_BYTES:
        raise HostError(
            f"the path of a machine's socket has {longest} bytes, and the kernel takes {MAX_SOCKET_PATH_BYTES}",
            details=str(directory / LONGEST_SOCKET_NAME),
            hint="set VMKIT_RUNTIME_DIR to a shorter path, or choose a shorter --name",
        )
