"""Parts of the host's files, read by offset: an archive's members stay where they are until they are packed.

A file is opened once and read through its descriptor, so what is read is of one file whatever becomes of its name.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from vmkit.errors import BuildError, ConfigError

CHUNK_BYTES = 1 << 20
# An offset above it is none for pread(2).
_OFFSET_LIMIT = 1 << 62

Identity = tuple[int, int, int, int, int]


def identify(status: os.stat_result) -> Identity:
    """What is another as soon as a file's content may be another."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class HostFile:
    """A file of the user's, open for reading. `read` is a Reader of it. Close it, or use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        """Opens it. Raises ConfigError where this user cannot."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise explain_unreadable(path, error) from error
        status = os.fstat(self.fd)
        self.identity = identify(status)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        # The size of a block device is where its end is.
        self.size_bytes = os.lseek(self.fd, 0, os.SEEK_END) if self.is_block_device else status.st_size

    def read(self, offset: int, length: int) -> bytes:
        """The bytes from offset on, fewer at the end, and none behind it."""
        if not 0 <= offset < _OFFSET_LIMIT or length <= 0:
            return b""
        parts = []
        while length:
            part = os.pread(self.fd, min(length, CHUNK_BYTES), offset)
            if not part:
                break
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def require_unchanged(self) -> None:
        """Raises BuildError when the file was written to since it was opened."""
        if identify(os.fstat(self.fd)) != self.identity:
            raise BuildError(f"{self.path} changed while vmkit read it", hint="try again when no program writes to it")

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def explain_unreadable(path: Path | str, error: OSError) -> ConfigError:
    """The error for a file of the user's that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        hint = "give the path of a root file system: a disk, an archive, a folder or an OCI layout"
        return ConfigError(f"there is no file {path}", hint=hint)
    if isinstance(error, PermissionError):
        return ConfigError(f"this user may not read {path}", hint=f"see who may: ls -ld {path}")
    return ConfigError(f"cannot read {path}: {error.strerror}", hint="give the path of a root file system")


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of a file, as a file's content in a tree, and as an archive in an archive."""

    file: HostFile
    offset: int
    size_bytes: int

    def read(self, offset: int, length: int) -> bytes:
        """A Reader of the part alone."""
        if offset < 0:
            return b""
        return self.file.read(self.offset + offset, min(length, self.size_bytes - offset))

    def chunks(self) -> Iterator[bytes]:
        """The whole part, in pieces. Raises BuildError where the file has become shorter."""
        at = 0
        while at < self.size_bytes:
            piece = self.read(at, CHUNK_BYTES)
            if not piece:
                raise BuildError(f"{self.file.path} became shorter while vmkit read it")
            at += len(piece)
            yield piece


def open_whole(file: HostFile) -> Extent:
    """The file as one part."""
    return Extent(file, 0, file.size_bytes)
