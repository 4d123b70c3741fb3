"""What vmkit.shares.folder does with one file of the host, by a descriptor that was reached beneath the folder."""

import errno
import itertools
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vmkit.shares.handles import NAMES_MAX
from vmkit.shares.nodes import Key

# The bits of a mode that a guest may set: neither setuid nor setgid.
MODE_BITS = 0o1777
# These say the same on every architecture that vmkit knows (asm-generic/fcntl.h).
TAKEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC
SECOND_NS = 10**9


@dataclass(frozen=True, slots=True)
class Changes:
    """Attributes to set; None leaves one as it is. Times are in nanoseconds since 1970."""

    mode: int | None = None
    size: int | None = None
    accessed_ns: int | None = None
    modified_ns: int | None = None


def make_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def find_key(status: os.stat_result) -> Key:
    return status.st_dev, status.st_ino


def find_status(name: bytes, folder: int) -> os.stat_result | None:
    """The attributes of a name in a folder; None where stat(2) fails."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError:
        return None


def is_writing(flags: int) -> bool:
    """Whether an open(2) with these flags can change the file."""
    return flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)


def reopen(fd: int, flags: int, *, is_quiet: bool) -> int:
    """Opens the regular file of a descriptor, and no other kind: to open a FIFO or a device can have effects.

    is_quiet: the file's time of access stays, where that is ours to say. Raises OSError.
    """
    check_regular(os.fstat(fd), is_for_writing=is_writing(flags))
    path, taken = _find_path(fd), flags & TAKEN_FLAGS | os.O_CLOEXEC
    if is_quiet:
        try:
            return os.open(path, taken | os.O_NOATIME)
        except PermissionError:
            pass
    return os.open(path, taken)


def check_regular(status: os.stat_result, *, is_for_writing: bool) -> None:
    """Raises OSError for what is no regular file, and for a program that runs as another user and would be written."""
    if stat.S_ISDIR(status.st_mode):
        raise make_error(errno.EISDIR)
    if not stat.S_ISREG(status.st_mode):
        raise make_error(errno.EPERM)
    if is_for_writing and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise make_error(errno.EPERM)


def change(fd: int, changes: Changes) -> None:
    """Sets attributes. Raises OSError."""
    status, path = os.fstat(fd), _find_path(fd)
    if changes.mode is not None:
        if stat.S_ISLNK(status.st_mode):
            raise make_error(errno.EOPNOTSUPP)
        Path(path).chmod(changes.mode & MODE_BITS)
    if changes.size is not None:
        check_regular(status, is_for_writing=True)
        os.truncate(path, changes.size)
    if changes.accessed_ns is not None or changes.modified_ns is not None:
        accessed_ns = status.st_atime_ns if changes.accessed_ns is None else changes.accessed_ns
        modified_ns = status.st_mtime_ns if changes.modified_ns is None else changes.modified_ns
        os.utime(path, ns=(accessed_ns, modified_ns))


def read_time(seconds: int, rest_ns: int) -> int:
    """A time of a guest, in nanoseconds since 1970. Times before are negative."""
    return (seconds - (1 << 64) if seconds >> 63 else seconds) * SECOND_NS + rest_ns


def read_names(fd: int) -> list[tuple[bytes, int, int]]:
    """The names of a folder, with inode numbers and types. Raises OSError."""
    own = os.fstat(fd).st_ino
    names = [(b".", own, stat.S_IFDIR >> 12), (b"..", own, stat.S_IFDIR >> 12)]
    with os.scandir(fd) as entries:
        found = itertools.islice(entries, NAMES_MAX)
        names += [(os.fsencode(entry.name), entry.inode(), _find_type(entry)) for entry in found]
    return names


def _find_type(entry: os.DirEntry[str]) -> int:
    """The upper bits of its mode; 0 where only stat(2) tells."""
    if entry.is_symlink():
        return stat.S_IFLNK >> 12
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR >> 12
    return stat.S_IFREG >> 12 if entry.is_file(follow_symlinks=False) else 0


def _find_path(fd: int) -> str:
    """A path to the file that this process has open, and to no other, whatever its names are now."""
    return f"/proc/self/fd/{fd}"
