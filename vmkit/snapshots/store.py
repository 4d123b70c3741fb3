"""Snapshots on disk: a folder each, with the memory, QEMU's state, the secret of the freeze, and a record of all.

`made/KEY` are those that `vmkit snapshot make` made: any of them can be made again, so there is a limit for all of them
together. `named/NAME` are the user's own, and only the user removes them. A folder appears whole under its name, by a
rename. All files are the user's alone: they hold every secret of the guest's memory.
"""

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.snapshots.key import SHOWN_DIGITS, render_facts
from vmkit.snapshots.pages import DamagedError, Run, check_runs

MADE, NAMED = "made", "named"
RECORD, MEMORY, STATE, SECRET = "snapshot.json", "memory", "state", "token"
FILES = (RECORD, MEMORY, STATE, SECRET)
# QEMU's state without the memory is 0.3 MB; a record has a line for each run.
MAX_STATE_BYTES = 64 << 20
MAX_RECORD_BYTES = 16 << 20
# Of all made snapshots together; those that were not used for longest go first.
MADE_BYTES_MAX = 4 << 30
MADE_IDLE_S = 14 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a snapshot. facts: what its key is made of. options: of the machine, for one with a name."""

    key: str
    image: str
    facts: Mapping[str, Any]
    memory_mib: int
    made: float
    state_bytes: int
    state_sha256: str
    runs: tuple[Run, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib << 20

    @property
    def file_bytes(self) -> int:
        """What the snapshot takes on disk, but for its record."""
        return self.state_bytes + sum(run.size for run in self.runs)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot in its folder."""

    folder: Path
    record: Record

    @property
    def name(self) -> str:
        """What a person calls it by: its name, or the first digits of its key."""
        return self.folder.name if self.is_named else self.record.key[:SHOWN_DIGITS]

    @property
    def is_named(self) -> bool:
        return self.folder.parent.name == NAMED


def write_record(folder: Path, record: Record) -> None:
    """Writes the record, which vouches for the other files. Raises OSError."""
    value = asdict(record)
    value["runs"] = [[run.address, run.size, run.checksum] for run in record.runs]
    text = render_facts(value)
    with open_new(folder / RECORD) as file:
        file.write(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": value}).encode())


def read_snapshot(folder: Path) -> Snapshot:
    """The snapshot in a folder, its record checked, and that its files are there and are this user's alone.

    Raises DamagedError, FileNotFoundError for a folder that is not there.
    """
    _check_owner(folder, 0o077)
    try:
        with open_own(folder, RECORD) as file:
            value = json.loads(file.read(MAX_RECORD_BYTES))
        record = value["record"]
        if hashlib.sha256(render_facts(record).encode()).hexdigest() != value["sha256"]:
            raise DamagedError("the snapshot is damaged: its record has another checksum")
        runs = tuple(Run(*(int(number) for number in run)) for run in record["runs"])
        parsed = Record(**{**record, "runs": runs})
        check_runs(runs, parsed.memory_bytes, (folder / MEMORY).stat().st_size)
        if (folder / STATE).stat().st_size != parsed.state_bytes or parsed.state_bytes > MAX_STATE_BYTES:
            raise DamagedError("the snapshot is damaged: the state of its devices has another size")
    except (ValueError, KeyError, TypeError, RecursionError, FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError("the snapshot is damaged: it has no record that can be read") from error
    return Snapshot(folder, parsed)


def check_state(snapshot: Snapshot) -> None:
    """Reads the state of the devices and compares it. Raises DamagedError, OSError."""
    with open_own(snapshot.folder, STATE) as file:
        if hashlib.sha256(file.read(MAX_STATE_BYTES)).hexdigest() != snapshot.record.state_sha256:
            raise DamagedError("the snapshot is damaged: the state of its devices differs")


def open_own(folder: Path, name: str, flags: int = os.O_RDONLY) -> Any:
    """A file of a snapshot, which must be this user's alone. Raises DamagedError, OSError."""
    fd = os.open(folder / name, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
    file = os.fdopen(fd, "rb" if flags == os.O_RDONLY else "r+b", buffering=0)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        file.close()
        raise DamagedError(f"the snapshot's file {folder / name} must be yours alone (mode 0600)")
    return file


def open_new(path: Path) -> Any:
    """A new file for this user alone. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.fchmod(fd, 0o600)
    return os.fdopen(fd, "r+b", buffering=0)


class Store:
    """The snapshots in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_made(self, key: str) -> Path:
        return self.folder / MADE / key

    def find_named(self, name: str) -> Path:
        return self.folder / NAMED / name

    def read_all(self) -> list[Snapshot]:
        """All that can be read, those with names first. Raises HostError for a folder that this user cannot open."""
        found = []
        for path in self._list_folders():
            try:
                found.append(read_snapshot(path))
            except (MachineError, HostError, OSError):
                continue
        return found

    def pick(self, word: str) -> Path:
        """The folder of a snapshot by its name or the first digits of its key. Raises ConfigError."""
        folders = self._list_folders()
        exact = [path for path in folders if path.name == word]
        found = exact or [path for path in folders if path.parent.name == MADE and path.name.startswith(word)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"several snapshots begin with '{word}'", hint="give more of its digits")
        raise ConfigError(f"there is no snapshot '{word}'", hint="vmkit snapshot list shows those there are")

    def remove(self, folder: Path) -> None:
        """Removes a snapshot at once: first its name, then its files. A machine that loads it now starts by a boot."""
        old = folder.with_name(f".{folder.name}.{os.getpid()}.{time.monotonic_ns()}")
        folder.rename(old)
        shutil.rmtree(old, ignore_errors=True)

    def prune(self, max_bytes: int = MADE_BYTES_MAX, idle_s: float = MADE_IDLE_S, keep: str = "") -> list[str]:
        """Removes made snapshots: what cannot be read, what was long not used, and the oldest over the limit.

        keep: the key of one that stays. Returns the keys of those that are gone.
        """
        gone: list[str] = []
        used = 0
        paths = [path for path in self._list_folders() if path.parent.name == MADE]
        for path in sorted(paths, key=_find_last_use, reverse=True):
            try:
                size = read_snapshot(path).record.file_bytes
            except (MachineError, HostError, OSError):
                size = max_bytes + 1
            is_old = time.time() - _find_last_use(path) > idle_s
            if path.name != keep and (is_old or used + size > max_bytes):
                self.remove(path)
                gone.append(path.name)
            else:
                used += size
        for folder in (self.folder / MADE, self.folder / NAMED):
            for path in folder.glob(".*"):
                # Left by a process that was killed while it removed one.
                shutil.rmtree(path, ignore_errors=True)
        return gone

    def touch(self, folder: Path) -> None:
        """Notes that a snapshot was used now."""
        try:
            os.utime(folder)
        except OSError:
            return

    def _list_folders(self) -> list[Path]:
        found = []
        for kind in (NAMED, MADE):
            folder = self.folder / kind
            try:
                if folder.is_dir():
                    found += sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            except PermissionError as error:
                raise HostError(
                    f"cannot look for snapshots in {error.filename}: {error.strerror}",
                    hint="another user made this folder; remove it as that user",
                ) from error
        return found


def _find_last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _check_owner(folder: Path, others: int) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & others:
        raise DamagedError(f"the snapshot's folder {folder} must be yours alone (mode 0700)")
