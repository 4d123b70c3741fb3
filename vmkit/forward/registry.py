"""The registry of lasting forwards: one directory per forward below the runtime directory, one lock in it.

As with machines (vmkit.machine.registry), the process that keeps the forward holds the lock for life. A process that
gets the lock knows that the entry is stale. Names that begin with a dot are entries being made.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vmkit.errors import HostError
from vmkit.machine.registry import open_runtime_directory
from vsh.registry import find_runtime_directory, is_held

FORWARDS = "forwards"
RECORD = "forward.json"
LOCK = "lock"
LOG = "log"
NEW_PREFIX = ".new."
MAX_RECORD_BYTES = 64 * 1024
# More forwards than anybody has.
MAX_NUMBER = 10_000


@dataclass(frozen=True, slots=True)
class Kept:
    """A forward that is kept: `machine` is the name it is for; `forwards` what was asked for, as `-L listen:target`;
    `listening` where each listens, in the same order.
    """

    number: int
    machine: str
    forwards: tuple[str, ...]
    listening: tuple[str, ...]
    pid: int
    started: float


@contextlib.contextmanager
def make_entry(machine: str, forwards: tuple[str, ...]) -> Iterator["Entry"]:
    """An entry of this process, not to be seen by others before Entry.publish(), and gone at the end of the block."""
    root = _open_folder()
    _sweep(root)
    temporary = root / f"{NEW_PREFIX}{os.getpid()}"
    try:
        temporary.mkdir(mode=0o700)
        lock_fd = os.open(temporary / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot write to {root}: {error.strerror}") from error
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    entry = Entry(root, temporary, machine, forwards)
    try:
        yield entry
    finally:
        shutil.rmtree(entry.directory, ignore_errors=True)
        os.close(lock_fd)


class Entry:
    """Our own entry. Invariant: `directory` is where it is now."""

    def __init__(self, root: Path, directory: Path, machine: str, forwards: tuple[str, ...]) -> None:
        self._root = root
        self.directory = directory
        self._machine = machine
        self._forwards = forwards

    def publish(self, listening: tuple[str, ...]) -> Kept:
        """Gives it the lowest free number, and shows it to others."""
        for number in range(1, MAX_NUMBER):
            kept = Kept(number, self._machine, self._forwards, listening, os.getpid(), time.time())
            (self.directory / RECORD).write_text(json.dumps(asdict(kept)))
            target = self._root / str(number)
            try:
                # A directory that is there and not empty is in the way.
                self.directory.rename(target)
            except OSError:
                continue
            self.directory = target
            return kept
        raise HostError(f"there are {MAX_NUMBER} forwards in {self._root}")


def read_kept() -> list[Kept]:
    """Every forward that is kept, by number."""
    folder = Path(find_runtime_directory()) / FORWARDS
    try:
        names = sorted((name for name in os.listdir(folder) if name.isdecimal()), key=int)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HostError(f"cannot read {folder}: {error.strerror}") from error
    found = (_read(folder / name) for name in names)
    return [kept for kept in found if kept is not None]


def read_log(number: int) -> str:
    """What went wrong with its connections, the last lines."""
    try:
        return (Path(find_runtime_directory()) / FORWARDS / str(number) / LOG).read_text(errors="replace")
    except OSError:
        return ""


def _read(directory: Path) -> Kept | None:
    try:
        if not is_held(directory / LOCK):
            return None
        with (directory / RECORD).open("rb") as file:
            record = json.loads(file.read(MAX_RECORD_BYTES))
        kept = Kept(
            number=int(record["number"]),
            machine=str(record["machine"]),
            forwards=tuple(map(str, record["forwards"])),
            listening=tuple(map(str, record["listening"])),
            pid=int(record["pid"]),
            started=float(record["started"]),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kept if str(kept.number) == directory.name else None


def _open_folder() -> Path:
    root = open_runtime_directory() / FORWARDS
    try:
        root.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise HostError(f"cannot make {root}: {error.strerror}") from error
    return root


def _sweep(root: Path) -> None:
    """Removes what processes that were killed have left."""
    for path in root.iterdir():
        # One that is being made has no lock for a moment.
        if (path / LOCK).exists() and not is_held(path / LOCK):
            shutil.rmtree(path, ignore_errors=True)
