"""Reads the host's files that a recipe names: regular files, up to a limit, without waiting.

A recipe may come from a stranger. A FIFO would make the build wait for ever, a device may do something when it is
opened.
"""

import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_CHUNK_BYTES = 1 << 20


class HostFileError(Exception):
    """A file that cannot be read; the text is the reason. Each caller names the file and what it was for."""


def read_host_file(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file. Raises HostFileError."""
    try:
        _check_kind(path.stat())
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            # Another file may have this name by now.
            _check_kind(os.fstat(descriptor))
            return _read(descriptor, limit_bytes)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostFileError(error.strerror or str(error)) from error
    except ValueError as error:
        # A NUL in the path.
        raise HostFileError(str(error)) from error


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((text for matches, text in _KINDS if matches(status.st_mode)), "a special file")
        raise HostFileError(f"it is {kind}, not a regular file")


def _read(descriptor: int, limit_bytes: int) -> bytes:
    data = bytearray()
    while chunk := os.read(descriptor, min(_CHUNK_BYTES, limit_bytes + 1 - len(data))):
        data += chunk
        if len(data) > limit_bytes:
            size = f"{limit_bytes >> 20} MiB" if limit_bytes >= 1 << 20 else f"{limit_bytes} bytes"
            raise HostFileError(f"it is larger than {size}")
    return bytes(data)
