"""What vmkit keeps on this host's disks: how many bytes of what, which of them no machine uses, and their removal.

Everything that prune() removes can be made again. Stored machines, crashes and snapshots with a name are counted,
and stay.
"""

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.crashes.place import find_usable_folder
from vmkit.crashes.store import list_all
from vmkit.entries.entry import NEW_PREFIX, OLD_PREFIX
from vmkit.entries.folder import hold_registry
from vmkit.errors import HostError
from vmkit.image.cache import find_cache_dir, open_cache
from vmkit.machine.launch import Layout
from vmkit.machine.registry import sweep
from vmkit.machine.restore import SNAPSHOTS_VARIABLE, find_snapshots_dir
from vmkit.snapshots.store import MADE, NAMED, RECORD, Store
from vmkit.state import check_own_folder
from vmkit.stored.place import find_present_folder
from vmkit.stored.store import read_all_stored, sweep_stored
from vsh.registry import LOCK, MACHINES, find_runtime_directory, is_held, read_machines

# What was used within a week is most likely used again.
IDLE_S = 7 * 24 * 3600.0
# A start that takes an image or a root says so when QEMU starts, and may wait for a build before.
BUSY_S = 3600.0
MAX_RECORD_BYTES = 16 << 20
MAX_ARGV_BYTES = 64 << 10

IMAGES, ROOTS, INITRAMFSES, PACKAGES = "images", "roots", "initramfses", "packages"
SNAPSHOTS, NAMED_SNAPSHOTS = "snapshots", "named snapshots"
LEFTOVERS, STORED, CRASHES = "leftovers", "stored machines", "crashes"
# What vmkit removes has a SHA-256 as its name. Anything else in those folders is not of vmkit's making.
_KEY = re.compile(r"[0-9a-f]{64}")
# In the order of the output.
KINDS = (IMAGES, ROOTS, INITRAMFSES, PACKAGES, SNAPSHOTS, NAMED_SNAPSHOTS, STORED, CRASHES, LEFTOVERS)


@dataclass(frozen=True, slots=True)
class Holding:
    """One thing that takes room. used: when last, in seconds since 1970. is_kept: a machine uses it, or only its user
    removes it.
    """

    kind: str
    path: Path
    size_bytes: int
    used: float
    is_kept: bool = False


@dataclass(frozen=True, slots=True)
class Total:
    """All things of a kind, and those among them that were or would be removed."""

    kind: str
    count: int
    size_bytes: int
    removed: int
    removed_bytes: int


def list_holdings() -> list[Holding]:
    """Everything that takes room, of every kind. Raises HostError."""
    return [*_list_cache(), *_list_snapshots(), *_list_stored(), *_list_crashes(), *_list_leftovers()]


def choose_unused(holdings: Iterable[Holding], *, idle_s: float = IDLE_S, now: float | None = None) -> list[Holding]:
    """Those that no machine uses, and that were not used for so long. What a killed program left is never used."""
    oldest = (time.time() if now is None else now) - idle_s
    return [one for one in holdings if not one.is_kept and (one.kind == LEFTOVERS or one.used <= oldest)]


def add_up(holdings: Iterable[Holding], removed: Iterable[Holding]) -> list[Total]:
    """The figures of each kind that there is something of."""
    gone = {one.path for one in removed}
    totals = []
    for kind in KINDS:
        ours = [one for one in holdings if one.kind == kind]
        theirs = [one for one in ours if one.path in gone]
        if ours:
            sizes = sum(one.size_bytes for one in ours), sum(one.size_bytes for one in theirs)
            totals.append(Total(kind, len(ours), sizes[0], len(theirs), sizes[1]))
    return totals


def remove(holdings: Iterable[Holding]) -> list[Holding]:
    """Removes things; returns those that are gone. One that another program has removed meanwhile is gone, too.

    What a machine uses by now, or what was used within the last hour, stays.
    """
    chosen = list(holdings)
    gone = []
    sweep()
    sweep_stored()
    snapshots = _find_own_snapshots()
    with open_cache(find_cache_dir()) as cache:
        cache.sweep()
        for one in chosen:
            with contextlib.suppress(OSError):
                if one.kind != LEFTOVERS and _is_busy(one):
                    continue
                if one.kind in (IMAGES, ROOTS, INITRAMFSES):
                    cache.discard(one.path)
                elif one.kind == SNAPSHOTS:
                    Store(snapshots).remove(one.path)
                elif one.kind == PACKAGES:
                    one.path.unlink()
            if not one.path.exists():
                gone.append(one)
    return gone


def _is_busy(one: Holding) -> bool:
    """Whether a thing must stay after all: other programs may have taken it since it was listed. Raises OSError."""
    used = one.path.stat().st_mtime
    is_shared = one.kind == ROOTS and _is_shared(one.path / "root")
    return is_shared or used > time.time() - BUSY_S or one.path.name in read_words()


def _find_own_snapshots() -> Path:
    """The folder of the snapshots. Raises HostError for one of another user's: it could lead anywhere."""
    folder = find_snapshots_dir()
    check_own_folder(folder, "snapshots", SNAPSHOTS_VARIABLE)
    return folder


def _list_cache() -> Iterator[Holding]:
    cache = find_cache_dir()
    check_own_folder(cache, "cache", "VMKIT_CACHE_DIR")
    words = read_words()
    needed = _find_named_images()
    for kind, folder in ((IMAGES, "images"), (ROOTS, "roots")):
        for path in _list_keys(cache / folder):
            is_kept = path.name in words or path.name in needed or (kind == ROOTS and _is_shared(path / "root"))
            yield _look(kind, path, is_kept=is_kept)
    for path in _list_keys(cache / "initrds"):
        yield _look(INITRAMFSES, path, is_kept=path.name in words)
    known = _find_known_packages(cache / "resolved")
    for path in _list_keys(cache / "packages", ".deb"):
        # Those of the last resolve are what a build without a network needs.
        yield _look(PACKAGES, path, is_kept=path.stem in known)
    for path in _list(cache / "tmp"):
        # Cache.sweep() leaves those whose program lives.
        yield _look(LEFTOVERS, path, is_kept=_is_locked(path))


def read_words() -> str:
    """The digests of the running machines' images, and QEMU's commands, which name their initramfses and the files of
    their roots."""
    texts = []
    for machine in read_machines():
        with contextlib.suppress(OSError), (Path(machine.directory) / Layout.ARGV).open("rb") as file:
            texts.append(file.read(MAX_ARGV_BYTES).decode(errors="surrogateescape"))
        texts.append(str(machine.record.get("digest", "")))
    return "\n".join(texts)


def _find_named_images() -> set[str]:
    """The digests of the images that snapshots with a name need."""
    found = set()
    for folder in _list(find_snapshots_dir() / NAMED):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found.add(str(json.loads(_read_start(folder / RECORD))["record"]["facts"]["image"]))
    return found


def _find_known_packages(folder: Path) -> set[str]:
    """The hashes of the packages of the last resolves."""
    found: set[str] = set()
    for path in _list(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            lock = json.loads(_read_start(path))
            # A build for another architecture runs programs of packages of this host's: the twins.
            found |= {str(record["sha256"]) for record in (*lock["records"], *lock.get("twins", ()))}
    return found


def _read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_RECORD_BYTES)


def _is_shared(path: Path) -> bool:
    """Whether a stored machine has the file under a name of its own."""
    with contextlib.suppress(OSError):
        return path.stat().st_nlink > 1
    return False


def _list_snapshots() -> Iterator[Holding]:
    folder = _find_own_snapshots()
    for path in _list_keys(folder / MADE):
        yield _look(SNAPSHOTS, path)
    for path in _list(folder / NAMED):
        if not path.name.startswith("."):
            yield _look(NAMED_SNAPSHOTS, path, is_kept=True)


def _list_stored() -> Iterator[Holding]:
    for one in read_all_stored():
        yield Holding(STORED, one.folder, one.measure(), 0.0, is_kept=True)


def _list_crashes() -> Iterator[Holding]:
    folder = find_usable_folder()
    for kept in [] if folder is None else list_all(folder):
        yield Holding(CRASHES, kept.folder, kept.measure(), 0.0, is_kept=True)


def _list_leftovers() -> Iterator[Holding]:
    """Folders of machines whose programs were killed."""
    runtime = Path(find_runtime_directory())
    if (runtime / MACHINES).is_dir():
        with hold_registry(runtime):
            for path in _list(runtime / MACHINES):
                # A folder without a lock was never a machine's.
                if not _is_held(path) and (path / LOCK).exists():
                    yield _look(LEFTOVERS, path)
    machines = find_present_folder()
    for path in [] if machines is None else _list(machines):
        if path.name.startswith((NEW_PREFIX, OLD_PREFIX)) and not _is_held(path):
            yield _look(LEFTOVERS, path)


def _is_held(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_held(folder / LOCK)
    return False


def _is_locked(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return is_held(folder)
    return True


def _look(kind: str, path: Path, *, is_kept: bool = False) -> Holding:
    used = 0.0
    with contextlib.suppress(OSError):
        used = path.stat().st_mtime
    return Holding(kind, path, _measure(path), used, is_kept)


def _measure(path: Path) -> int:
    """The bytes on the disk that go with a file or folder: a file with a second name stays.

    What vanishes meanwhile, another program removes.
    """
    total = _measure_one(path)
    if path.is_symlink():
        return total
    for folder, folders, files in os.walk(path):
        total += sum(_measure_one(Path(folder, name)) for name in (*folders, *files))
    return total


def _measure_one(path: Path) -> int:
    with contextlib.suppress(OSError):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode) or status.st_nlink == 1:
            return status.st_blocks * 512
    return 0


def _list_keys(folder: Path, suffix: str = "") -> list[Path]:
    """What vmkit made there. Behind a symbolic link there is nothing of vmkit's. Raises HostError."""
    if folder.is_symlink():
        return []
    return [path for path in _list(folder) if _KEY.fullmatch(path.name.removesuffix(suffix))]


def _list(folder: Path) -> list[Path]:
    """Raises HostError."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise HostError(f"cannot read {folder}: {error.strerror}", hint="make it your own, or remove it") from error
