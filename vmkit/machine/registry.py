"""The registry of machines: reserve a name and a CID, write a machine's record, and how a machine ended.

The monitor holds the lock of its machine's entry for life (vmkit.entries). The reading side is vsh.registry, which
finds machines without knowing vmkit.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from vmkit.entries import entry
from vmkit.entries.entry import NEW_PREFIX, make_entry, sweep_all, sweep_one
from vmkit.entries.folder import explain_errors, hold_registry, open_runtime_directory
from vmkit.errors import HostError, MachineError, NameInUseError
from vmkit.machine.launch import Layout
from vmkit.machine.spec import FIRST_GUEST_CID, MAX_NAME_CHARACTERS, check_name
from vmkit.state import find_state_folder
from vmkit.stored.place import list_names
from vsh.ending import ENDS
from vsh.registry import MACHINES, Entry, find_runtime_directory, read_machines

SCHEMA = 1
# The kernel refuses a taken CID only when it is claimed (vhost). So many taken ones in a row are no accident.
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


def find_state_directory() -> Path:
    """Where the logs of machines that ended badly are kept, one directory per name."""
    # No HOME, and a user the host has no name for, as in containers: the logs go where the machines were.
    return find_state_folder() or Path(find_runtime_directory()) / "ended"


def write_record(directory: Path, record: Mapping[str, object]) -> None:
    """Writes machine.json, whole. Raises OSError."""
    entry.write_record(directory / Layout.RECORD, {"schema": SCHEMA, **record})


def check_path_length(directory: Path) -> None:
    """Raises HostError when a socket in a machine's directory would have a longer path than the kernel takes."""
    longest = len(os.fsencode(directory / LONGEST_SOCKET_NAME))
    if longest > MAX_SOCKET_PATH_BYTES:
        raise HostError(
            f"the path of a machine's socket has {longest} bytes, and the kernel takes {MAX_SOCKET_PATH_BYTES}",
            details=str(directory / LONGEST_SOCKET_NAME),
            hint="set VMKIT_RUNTIME_DIR to a shorter path, or choose a shorter --name",
        )


def check_free(name: str | None, cid: int | None) -> None:
    """Raises MachineError when the asked name or CID is in use now. reserve() checks again: others may be faster."""
    if name is None and cid is None:
        return
    root = open_runtime_directory()
    with hold_registry(root), explain_errors(root):
        sweep_all(root / MACHINES)
        if name is not None:
            _check_name_is_free(name, _read_names(root))
        if cid is not None:
            _check_cid_is_free(cid, read_machines())


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
        with hold_registry(root), explain_errors(root):
            sweep_all(root / MACHINES)
            entries = read_machines()
            chosen_name = _choose_name(
                name, image, _read_names(root) | (read_stored_names() if name is None else set())
            )
            chosen_cid = _choose_cid(cid, entries, claim)
            directory = root / MACHINES / chosen_name
            check_path_length(directory)
            # Undone in reverse, and before anything is done: an interruption may come between any two lines.
            stack.callback(_sweep_locked, root, directory)
            full_record = {**record, "name": chosen_name, "cid": chosen_cid, "state": "starting"}
            new = stack.enter_context(make_entry(root / MACHINES, chosen_name))
            write_record(new.directory, full_record)
            new.publish(chosen_name)
        yield Reservation(chosen_name, chosen_cid, directory, new.lock_fd)


def sweep() -> None:
    """Removes the entries that no process holds. Makes no registry where there is none."""
    root = Path(find_runtime_directory())
    if (root / MACHINES).is_dir():
        with hold_registry(root), explain_errors(root):
            sweep_all(root / MACHINES)


def write_ending(directory: Path, ending: Mapping[str, object]) -> None:
    """Records how a machine ended, for a client that finds it gone or asks for its name later.

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


def _sweep_locked(root: Path, directory: Path) -> None:
    with hold_registry(root):
        sweep_one(directory)
        sweep_one(directory.with_name(NEW_PREFIX + directory.name))


def _read_names(root: Path) -> set[str]:
    """Every name that is in use: those of unreadable entries and of strangers' folders, too."""
    return {path.name for path in (root / MACHINES).iterdir()}


def read_stored_names() -> set[str]:
    """The names of the stored machines: one that stays must be able to start. Empty where they cannot be read."""
    with contextlib.suppress(HostError):
        return set(list_names())
    # vmkit trusts no folder that others can write to. `vmkit up NAME` tells.
    return set()


def _check_name_is_free(name: str, taken: set[str]) -> None:
    if name in taken:
        raise NameInUseError(
            f"a machine named '{name}' is running", hint=f"vmkit down {name}, or choose another --name"
        )


def _check_cid_is_free(cid: int, entries: list[Entry]) -> None:
    for owner in (machine.name for machine in entries if machine.cid == cid):
        raise MachineError(
            f"CID {cid} is in use by the machine '{owner}'", hint=f"vmkit down {owner}, or choose another --cid"
        )


def _choose_name(asked: str | None, image: str, taken: set[str]) -> str:
    if asked is not None:
        _check_name_is_free(asked, taken)
        return asked
    for number in count(1):
        suffix = "" if number == 1 else f"-{number}"
        name = image[: MAX_NAME_CHARACTERS - len(suffix)] + suffix
        if name not in taken:
            return check_name(name)
    raise AssertionError("count() has no end")


def _choose_cid(asked: int | None, entries: list[Entry], claim: Callable[[int], None]) -> int:
    if asked is not None:
        _check_cid_is_free(asked, entries)
        claim(asked)
        return asked
    taken = {entry.cid for entry in entries}
    free = (cid for cid in count(FIRST_GUEST_CID) if cid not in taken)
    for cid in islice(free, MAX_CID_ATTEMPTS):
        try:
            claim(cid)
        except MachineError:
            continue
        return cid
    raise MachineError(
        f"this host has no free CID among the {MAX_CID_ATTEMPTS} that vmkit tried", hint="choose one with --cid"
    )
