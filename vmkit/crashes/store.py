"""The crashes on disk: below the data folder a folder for each machine's name, and in it one for each crash, by number.

A crash outlives its machine, and only its user removes it, or a newer one that needs the room. A folder appears whole,
by a rename. All files are the user's alone: a dump holds every secret of the guest's memory. Who fills a folder holds a
lock on it, so that what a killed program leaves is found and swept.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.crashes.record import MAX_DIGITS, MAX_RECORD_BYTES, Crash, CrashKind, parse_crash, render_crash
from vmkit.entries.entry import NEW_PREFIX, OLD_PREFIX, write_record
from vmkit.errors import ConfigError, HostError, MachineError
from vsh.registry import is_held

RECORD, DMESG, DUMP, CORE, MAPS = "crash.json", "dmesg", "vmcore", "core", "maps"
# Of one machine's name, and of all names together. The oldest go first, so that a guest which crashes again and again
# takes the room of its own crashes, and not that of another's.
MAX_CRASHES, MACHINE_BYTES = 20, 8 << 30
# Of programs and services. One that crashes whenever it is started must not take the room of the kernel's last panic.
MAX_CORES, CORES_BYTES = 15, 6 << 30
MAX_ALL, ALL_BYTES = 200, 16 << 30
MAX_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class KeptCrash:
    """A crash in its folder. crash: None where its record cannot be read, and `damage` says why."""

    machine: str
    number: int
    folder: Path
    crash: Crash | None
    damage: str = ""

    @property
    def dump(self) -> Path:
        return self.folder / DUMP

    @property
    def core(self) -> Path:
        return self.folder / CORE

    @property
    def dmesg(self) -> Path:
        return self.folder / DMESG

    def measure(self) -> int:
        """The bytes of this host's disk that it takes."""
        total = 0
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                total += path.lstat().st_blocks * 512
        return total


class NewCrash:
    """A crash that no other program sees yet; `folder` is for its files. Invariant: its lock is held until close()."""

    def __init__(self, folder: Path, lock_fd: int) -> None:
        self.folder = folder
        self._lock_fd = lock_fd

    def publish(self, crash: Crash) -> Path:
        """Shows it under the next number; returns its folder. Raises OSError."""
        write_record(self.folder / RECORD, render_crash(crash))
        machine = self.folder.parent
        for _ in range(MAX_ATTEMPTS):
            target = machine / str(max(_list_numbers(machine), default=0) + 1)
            try:
                self.folder.rename(target)
            except OSError as error:
                # Another program has published at this moment: a folder that is not empty is not replaced.
                if error.errno != errno.ENOTEMPTY:
                    raise
                continue
            self.folder = target
            return target
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(machine))

    def close(self) -> None:
        """Removes what was not published."""
        if self._lock_fd < 0:
            return
        if self.folder.name.startswith(NEW_PREFIX):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1


def make_crash(root: Path, machine: str) -> NewCrash:
    """A new crash of a machine, in the folder of all crashes. Its caller closes it. Raises OSError."""
    folder = root / machine
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep(root)
    for _ in range(MAX_ATTEMPTS):
        new = folder / f"{NEW_PREFIX}{os.getpid()}.{time.monotonic_ns()}"
        new.mkdir(mode=0o700)
        lock_fd = -1
        try:
            lock_fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            new.stat()
        except (FileNotFoundError, BlockingIOError):
            # A program that sweeps has come between.
            if lock_fd >= 0:
                os.close(lock_fd)
            continue
        return NewCrash(new, lock_fd)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder))


def sweep(root: Path) -> None:
    """Removes what killed programs have left.

    A machine's name may never be used again, and half a dump takes gigabytes that no command lists.
    """
    with contextlib.suppress(HostError):
        for name in _list_names(root):
            with contextlib.suppress(OSError):
                _sweep(root / name)


def bound(root: Path, machine: str) -> list[Path]:
    """Removes the oldest crashes over the limits, first those of one machine. Returns the folders that are gone."""
    # The newest of all stays: a person looks for that one now.
    cores = [kept for kept in _list_machine(root, machine) if kept.crash and kept.crash.kind is not CrashKind.PANIC]
    gone = _remove_oldest(cores, MAX_CORES, CORES_BYTES, _pick_core)
    gone += _remove_oldest(_list_machine(root, machine), MAX_CRASHES, MACHINE_BYTES)
    return gone + _remove_oldest(_sort(list_all(root)), MAX_ALL, ALL_BYTES)


def list_all(root: Path) -> list[KeptCrash]:
    """Every crash, by its machine and number. Raises HostError."""
    return [kept for machine in _list_names(root) for kept in _list_machine(root, machine)]


def list_of(root: Path, machine: str) -> list[KeptCrash]:
    """The crashes of a machine's name, the oldest first. Raises HostError."""
    return _list_machine(root, machine)


def pick(root: Path, machine: str, number: int | None) -> KeptCrash:
    """One crash; number None: the newest. Raises ConfigError."""
    found = _list_machine(root, machine)
    if not found:
        raise ConfigError(f"no crash of '{machine}' is kept", hint="vmkit crashes lists those there are")
    if number is None:
        return found[-1]
    for kept in found:
        if kept.number == number:
            return kept
    known = ", ".join(str(kept.number) for kept in found)
    raise ConfigError(f"'{machine}' has no crash {number}", hint=f"there are: {known}")


def remove(kept: KeptCrash) -> None:
    """Removes a crash at once: first its number, then its files. Raises MachineError."""
    try:
        _remove(kept.folder)
    except OSError as error:
        raise MachineError(f"cannot remove {kept.folder}: {error.strerror}") from error
    with contextlib.suppress(OSError):
        # The last one takes the machine's folder along.
        kept.folder.parent.rmdir()


def _remove(folder: Path) -> None:
    old = folder.with_name(f"{OLD_PREFIX}{folder.name}.{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _remove_oldest(
    crashes: list[KeptCrash],
    max_count: int,
    max_bytes: int,
    pick_next: Callable[[list[KeptCrash]], KeptCrash] = lambda crashes: crashes[0],
) -> list[Path]:
    """crashes: the oldest first."""
    gone = []
    left = list(crashes)
    sizes = {kept.folder: kept.measure() for kept in crashes}
    while len(left) > 1 and (len(left) > max_count or sum(sizes.values()) > max_bytes):
        kept = pick_next(left)
        left.remove(kept)
        sizes.pop(kept.folder)
        with contextlib.suppress(MachineError):
            remove(kept)
            gone.append(kept.folder)
    return gone


def _pick_core(cores: list[KeptCrash]) -> KeptCrash:
    """What goes first: the oldest of the kind that has most, and then of which user or service of that kind.

    The kinds are root's cores, those of all other users together, and services without a core. A user whose program
    crashes without end thus takes no room of root's, and neither does a service that fails without end.
    """
    owners = [_find_owner(kept.crash) for kept in cores]
    of_all, of_one = Counter(kind for kind, _ in owners), Counter(owners)
    return max(zip(cores, owners, strict=True), key=lambda pair: (of_all[pair[1][0]], of_one[pair[1]]))[0]


def _find_owner(crash: Crash | None) -> tuple[str, object]:
    if crash is not None and crash.program is not None:
        return "root" if crash.program.uid == 0 else "user", crash.program.uid
    return "service", None if crash is None or crash.service is None else crash.service.unit


def _sort(crashes: list[KeptCrash]) -> list[KeptCrash]:
    """The oldest first. One whose record is damaged is as old as can be."""
    return sorted(crashes, key=lambda kept: 0.0 if kept.crash is None else kept.crash.at_s)


def _sweep(folder: Path) -> None:
    """Removes what killed programs have left in a machine's folder."""
    for path in folder.iterdir():
        if path.name.startswith(OLD_PREFIX) or (path.name.startswith(NEW_PREFIX) and not _is_held(path)):
            shutil.rmtree(path, ignore_errors=True)


def _is_held(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_held(path)
    return True


def _list_names(root: Path) -> list[str]:
    return sorted(path.name for path in _iterate(root) if not path.name.startswith("."))


def _list_machine(root: Path, machine: str) -> list[KeptCrash]:
    folder = root / machine
    return [_read(folder, number) for number in sorted(_list_numbers(folder))]


def _list_numbers(folder: Path) -> Iterator[int]:
    for path in _iterate(folder):
        if path.name.isascii() and path.name.isdigit() and len(path.name) <= MAX_DIGITS:
            yield int(path.name)


def _iterate(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostError(f"cannot look for crashes in {folder}: {error.strerror}") from error


def _read(folder: Path, number: int) -> KeptCrash:
    path = folder / str(number)
    try:
        with (path / RECORD).open("rb") as file:
            crash = parse_crash(json.loads(file.read(MAX_RECORD_BYTES)))
    except OSError as error:
        return KeptCrash(folder.name, number, path, None, f"cannot read its record: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return KeptCrash(folder.name, number, path, None, f"its record is damaged: {error}")
    return KeptCrash(folder.name, number, path, crash)
