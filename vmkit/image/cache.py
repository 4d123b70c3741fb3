"""The user's cache folder: where finished images, packages and apt's state are kept, safely for many processes at once.

Every file under its final name is whole: it was written elsewhere, synced and renamed. Locks are flocks, so the kernel
releases them when a process dies, however it dies. The next process sweeps what a dead one left under tmp/. Removing
the whole folder is always safe.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vmkit.errors import BuildError, HostError, VmkitError
from vmkit.image.debian.apt import Apt, Archive, archive_key
from vmkit.state import check_own_folder

# A build with everything to fetch on a slow line. A build that waits for another prints that it waits.
LOCK_TIMEOUT_S = 1800.0
# How often a waiting process tries again: too short for a person to notice, and it costs almost no processor time.
_LOCK_POLL_S = 0.1
# An image that was not used for this long is removed by the next build.
IMAGE_IDLE_LIMIT_S = 30 * 24 * 3600
# Of all initramfses with the modules of other kernels. Each build of a kernel makes one of up to 100 MB.
INITRDS_MAX_BYTES = 1 << 30
# QEMU reads an initramfs when it starts. A start that has just taken one from here may not have come so far.
INITRD_BUSY_S = 900.0

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be too large",
}


def find_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$VMKIT_CACHE_DIR, else $XDG_CACHE_HOME/vmkit, else ~/.cache/vmkit.

    Relative values of XDG_CACHE_HOME are ignored, as its specification asks. Raises HostError where there is no home.
    """
    named = environ.get("VMKIT_CACHE_DIR")
    if named:
        return Path(named).absolute()
    base = environ.get("XDG_CACHE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "vmkit"
    try:
        return Path.home() / ".cache" / "vmkit"
    except RuntimeError as error:
        hint = "set HOME, or VMKIT_CACHE_DIR to a directory of your own"
        raise HostError("there is no home directory to keep images in", hint=hint) from error


class Cache:
    """One cache folder that belongs to the caller."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def lock_path(self, key: str) -> Path:
        return self._folder / "resolved" / f"{key}.json"

    def imported_path(self, key: str) -> Path:
        """Returns the file with the packages of an image that another host built (vmkit.image.travel)."""
        return self._folder / "imported" / f"{key}.json"

    def package_path(self, sha256: str) -> Path:
        return self._folder / "packages" / f"{sha256}.deb"

    def image_dir(self, digest: str) -> Path:
        return self._folder / "images" / digest

    def root_dir(self, key: str) -> Path:
        """Returns the folder of a root that a user brought, as a disk (vmkit.roots)."""
        return self._folder / "roots" / key

    def initrd_dir(self, key: str) -> Path:
        """Returns the folder of an image's initramfs with the modules of another kernel (vmkit.trees)."""
        return self._folder / "initrds" / key

    def source_path(self, name: str) -> Path:
        """Returns the file that tells which root an archive of a user's became (vmkit.roots)."""
        return self._folder / "sources" / name

    def is_inside(self, folder: Path) -> bool:
        """Whether the cache is in `folder`, which then changes with the cache."""
        return self._folder.resolve().is_relative_to(folder.resolve())

    def note_path(self, digest: str) -> Path:
        """Returns the file that keeps the last comparison of an image with its manifest (vmkit.image.artifacts)."""
        return self._folder / "compared" / f"{digest}.json"

    @contextmanager
    def locked(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Holds the lock `name`; calls waiting once if another has it. Raises BuildError after LOCK_TIMEOUT_S."""
        path = self._folder / "flock" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never removed: a lock file that is unlinked while a process waits for it would be two locks.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for(descriptor, path, waiting)
            yield
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int, path: Path, waiting: Callable[[], None] | None) -> None:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_flock(descriptor):
            if waiting:
                waiting()
                waiting = None
            if time.monotonic() > deadline:
                raise BuildError(
                    f"another build has held {path} for more than {LOCK_TIMEOUT_S / 60:g} minutes",
                    hint=f"see who it is: fuser -v {path}",
                )
            time.sleep(_LOCK_POLL_S)

    @contextmanager
    def temporary_dir(self) -> Iterator[Path]:
        """Yields a folder on the cache's filesystem and removes it at the end. After a kill, sweep() does."""
        descriptor, path = self._make_temporary()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def _make_temporary(self) -> tuple[int, Path]:
        root = self._folder / "tmp"
        root.mkdir(parents=True, exist_ok=True)
        while True:
            path = root / secrets.token_hex(8)
            path.mkdir()
            # A sweep in another process may have removed the folder between mkdir and flock. Then make another.
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if _try_flock(descriptor) and path.is_dir():
                return descriptor, path
            os.close(descriptor)

    def sweep(self) -> None:
        """Removes what dead processes left, and images, roots and initramfs unused for IMAGE_IDLE_LIMIT_S."""
        for path in _list(self._folder / "tmp"):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _try_flock(descriptor):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(descriptor)
        oldest = time.time() - IMAGE_IDLE_LIMIT_S
        for path in (path for name in ("images", "roots", "initrds") for path in _list(self._folder / name)):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    self.discard(path)
        for path in _list(self._folder / "sources"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
        for path in _list(self._folder / "compared"):
            if not (self.image_dir(path.stem).exists() or self.root_dir(path.stem).exists()):
                path.unlink(missing_ok=True)

    def limit_initrds(self, max_bytes: int = INITRDS_MAX_BYTES, *, needed: str = "") -> None:
        """Removes initramfses until the rest has max_bytes, the longest unused first.

        One that a start may still need stays. So does one whose key is in `needed`: the guest may reboot.
        """
        found = []
        for path in _list(self._folder / "initrds"):
            with suppress(OSError):
                used = path.stat().st_mtime
                found.append((used, sum(file.stat().st_size for file in path.iterdir()), path))
        total = sum(size for _, size, _ in found)
        newest = time.time() - INITRD_BUSY_S
        for used, size, path in sorted(found):
            if total <= max_bytes or used > newest:
                return
            if path.name in needed:
                continue
            with suppress(OSError):
                self.discard(path)
                total -= size

    def discard(self, path: Path) -> None:
        """Removes a folder at once: no other process sees half of it."""
        with self.temporary_dir() as folder:
            path.rename(folder / "discarded")

    def adopt(self, path: Path, final: Path) -> None:
        """Puts a finished file or folder of this filesystem under its final name, safe against a power cut."""
        final.parent.mkdir(parents=True, exist_ok=True)
        for inner in sorted(path.rglob("*")) if path.is_dir() else ():
            _sync(inner)
        _sync(path)
        path.rename(final)
        _sync(final.parent)

    @contextmanager
    def open_apt(self, archive: Archive) -> Iterator[Apt]:
        """Yields the archive's private apt state, locked for this process alone."""
        key = archive_key(archive)
        folder = self._folder / "apt" / key
        with self.locked(f"apt-{key}"):
            folder.mkdir(parents=True, exist_ok=True)
            yield Apt(folder, archive)


@contextmanager
def open_cache(folder: Path, kind: str = "cache", variable: str = "VMKIT_CACHE_DIR") -> Iterator[Cache]:
    """The cache in `folder`, made when missing. Raises HostError for one that others can write to.

    kind, variable: what errors call the folder, and the variable with which a user names another one.

    Turns every OSError inside the block into a BuildError a person can act on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        check_own_folder(folder, kind, variable)
        yield Cache(folder)
    except VmkitError:
        raise
    except OSError as error:
        raise _explain(error, folder, kind, variable) from error


def _explain(error: OSError, folder: Path, kind: str, variable: str) -> BuildError:
    where = error.filename or folder
    if error.errno in _FULL:
        return BuildError(
            f"{_FULL[error.errno]} while writing to {where}",
            hint=f"make room, or name another {kind} folder: {variable}=DIR (now {folder})",
        )
    # A missing parent that the system does not let us make, as below /proc.
    is_folder = error.errno == errno.ENOENT and Path(where) in (folder, *folder.parents)
    if is_folder or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return BuildError(f"cannot use the {kind} folder: {error}", hint=f"name one of your own: {variable}=DIR")
    return BuildError(f"the build failed: {error}", details=str(where))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a small file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        new.write_bytes(data)
        _sync(new)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _try_flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
