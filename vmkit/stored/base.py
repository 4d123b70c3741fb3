"""The base of a stored machine's disk: taken from the cache so that the cache can go, or a file of the user's.

What vmkit packed is in the cache under a second name, in the machine's folder: a hard link, which costs nothing. Where
the cache is on another file system, it is a copy.
"""

import errno
import os
from pathlib import Path

from vmkit.errors import MachineError
from vmkit.stored.record import Base

BASE = "base"
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES}
_COPY_BYTES = 64 << 20


def take_base(source: Path, folder: Path, disk_format: str) -> Base:
    """Gives a file of the cache a second name in `folder`. Raises OSError."""
    target = folder / BASE
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        copy_sparsely(source, target)
    return describe_base(target, BASE, disk_format)


def describe_base(path: Path, name: str, disk_format: str) -> Base:
    """What a record has of a base. name: its path there. Raises OSError."""
    status = path.stat()
    return Base(name, disk_format, status.st_size, status.st_mtime_ns)


def require_same(base: Base, folder: Path, name: str) -> Path:
    """The path of a machine's base. Raises MachineError where the base is gone, or is no longer what it was.

    What a disk on top of another has is the difference, so on a base that changed it is nonsense.
    """
    path = folder / base.path
    again = f"vmkit rm {name}, and create it again"
    try:
        status = path.stat()
    except OSError as error:
        raise MachineError(
            f"the base of '{name}' cannot be read: {path}: {error.strerror}", hint=f"put it back; or {again}"
        ) from error
    if (status.st_size, status.st_mtime_ns) != (base.size_bytes, base.mtime_ns):
        raise MachineError(
            f"the base of '{name}' changed since the machine was created: {path}",
            details="The machine's disk holds only the differences to the old base.",
            hint=f"put the old file back, with its time (cp --preserve); or {again}",
        )
    return path


def copy_sparsely(source: Path, target: Path) -> None:
    """Copies a file's data and leaves its holes holes. Raises OSError; then there is no copy."""
    try:
        with source.open("rb") as old, open(target, "xb") as new:  # noqa: PTH123  (it must not be there)
            os.fchmod(new.fileno(), 0o600)
            _copy_data(old.fileno(), new.fileno())
            os.fsync(new.fileno())
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _copy_data(old: int, new: int) -> None:
    size = os.fstat(old).st_size
    os.ftruncate(new, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError as error:
            # Nothing but a hole is left.
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(old, start, os.SEEK_HOLE)
        os.lseek(new, start, os.SEEK_SET)
        while start < end:
            sent = os.sendfile(new, old, start, min(_COPY_BYTES, end - start))
            if not sent:
                raise OSError(errno.EIO, "the file became shorter while vmkit copied it", str(old))
            start += sent
