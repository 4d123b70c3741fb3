"""What a copy moves, and the four things that both sides must have: folders to read and to fill, readers, writers.

Every call that may talk to a guest is a step (see vmkit.copy.engine). The side of the host has steps that never wait.
"""

import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from vmkit.copy.engine import Arrival, Step
from vmkit.copy.wire import Xattrs
from vmkit.errors import VmkitError

# Linux takes no offset above it.
SIZE_BYTES_MAX = (1 << 63) - 1
# A file of /sys has the size of a page, and less data.
PAGE_BYTES_MAX = 64 << 10
# A file in the making. A fixed length, so that the longest name still has one.
TEMPORARY = b".vmkit-cp-"
CHANGED = "it changed while vmkit read it"
Piece = bytes | bytearray | memoryview


class FileError(VmkitError):
    """One file could not be read or written. The brief is the reason alone; the others may still be copied."""


class FullError(VmkitError):
    """The destination takes no more data, so the copy ends. The brief is the reason alone."""


class ItemKind(StrEnum):
    """The kinds of files that a copy tells apart."""

    FILE = "file"
    FOLDER = "directory"
    LINK = "symbolic link"
    OTHER = "special file"


KINDS = {stat.S_IFREG: ItemKind.FILE, stat.S_IFDIR: ItemKind.FOLDER, stat.S_IFLNK: ItemKind.LINK}


@dataclass(frozen=True, slots=True)
class Item:
    """A file's metadata. identity: the same for all hard links of a file that has several; None where unknown.

    xattrs: the extended attributes that the copy gets, where it keeps them.
    """

    kind: ItemKind
    size: int
    mode: int
    atime_ns: int = 0
    mtime_ns: int = 0
    uid: int | None = None
    gid: int | None = None
    identity: tuple[int, int] | None = None
    xattrs: Xattrs = ()

    def with_xattrs(self, xattrs: Xattrs) -> "Item":
        """Returns the same with these extended attributes; most files have none."""
        return replace(self, xattrs=xattrs) if xattrs else self


@dataclass(frozen=True, slots=True)
class Keep:
    """What a copy keeps besides modes and times. fsync: a file is on the disk before it gets its name.

    xattrs: extended attributes.
    """

    owners: bool = False
    fsync: bool = False
    xattrs: bool = False


def make_temporary_name() -> bytes:
    """Returns a name that no other copy has."""
    return TEMPORARY + secrets.token_hex(8).encode()


def join_path(folder: bytes, name: bytes) -> bytes:
    """Returns a path; the name `.` stands for the directory itself."""
    return folder if name == b"." else name if folder == b"." else folder.rstrip(b"/") + b"/" + name


def refuse(error: OSError) -> FileError:
    """Returns the refusal of an error of this host."""
    return FileError(f"{os.strerror(error.errno) if error.errno else error}")


def is_same_time(one: Item, other: Item) -> bool:
    """Whether two files changed in the same second: SFTP 3 counts no parts of it."""
    return one.mtime_ns // 10**9 == other.mtime_ns // 10**9


def is_same_metadata(item: Item, old: Item, mode_mask: int, *, has_owners: bool) -> bool:
    """Whether a copy of `item` already has all that a copy keeps. mode_mask: the bits that the destination takes."""
    is_same_mode = not (item.mode ^ old.mode) & mode_mask
    is_same_owner = not has_owners or item.uid is None or (item.uid, item.gid) == (old.uid, old.gid)
    return is_same_mode and is_same_owner and is_same_time(item, old)


class Descriptors:
    """The open descriptors of one side of a copy, so that an interrupted copy leaves none open."""

    def __init__(self) -> None:
        self._fds: set[int] = set()

    def open(self, path: bytes, flags: int, mode: int = 0, dir_fd: int | None = None) -> int:
        """Opens a file as os.open does. Raises OSError."""
        fd = os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)
        self._fds.add(fd)
        return fd

    def close(self, fd: int) -> None:
        """Closes a descriptor that is open."""
        self._fds.discard(fd)
        os.close(fd)

    def close_all(self) -> None:
        """Closes what is open."""
        while self._fds:
            os.close(self._fds.pop())


class FileReader(Protocol):
    """A file that is being read, in any order."""

    @property
    def item(self) -> Item:
        """The file as it was when it was opened."""

    @property
    def end(self) -> int:
        """The size of the data, known for sure after finish()."""

    @property
    def pending(self) -> int:
        """How many requests have no reply."""

    @property
    def can_ask(self) -> bool:
        """Whether data is left that was not asked for."""

    def has_room(self) -> bool:
        """Whether another request may go beside others."""

    def ask(self) -> None:
        """Asks for the next data."""

    def take(self) -> Sequence[tuple[int, Piece]]:
        """Returns the data that came, with offsets."""

    def receive(self, arrival: Arrival) -> bool:
        """Takes a reply; False for one that is another's."""

    def finish(self) -> Step[None]:
        """Checks that the file is what it was when it was opened, and closes it. Raises FileError."""

    def close(self) -> Step[None]:
        """Closes it after an error."""


class WholeReader:
    """A small file whose data is all here already, so it can be written in one step."""

    pending = 0
    can_ask = False

    def __init__(self, item: Item, data: Piece, *, is_of_guest: bool) -> None:
        self.item = item
        self.data = data
        self.is_of_guest = is_of_guest
        self.end = len(data)
        self._is_taken = not data

    def has_room(self) -> bool:
        return True

    def ask(self) -> None:
        raise AssertionError("all data is here")

    def take(self) -> Sequence[tuple[int, Piece]]:
        if self._is_taken:
            return []
        self._is_taken = True
        return [(0, self.data)]

    def receive(self, arrival: Arrival) -> bool:
        return False

    def finish(self) -> Step[None]:
        yield from ()

    def close(self) -> Step[None]:
        yield from ()


class FileWriter(Protocol):
    """A file in the making, under a temporary name."""

    @property
    def pending(self) -> int:
        """How many requests have no reply."""

    def has_room(self) -> bool:
        """Whether another request may go beside others."""

    def put(self, offset: int, data: Piece) -> None:
        """Writes data, or leaves a hole for zeros."""

    def receive(self, arrival: Arrival) -> None:
        """Takes a reply."""

    def finish(self, item: Item, size: int) -> Step[None]:
        """Gives the file its size, mode and times, and its name. Raises FileError, FullError."""

    def drop(self) -> Step[None]:
        """Removes it after an error."""


class SourceFolder(Protocol):
    """A directory that is read. Close it after use."""

    def describe(self, name: bytes) -> str:
        """Returns the path of a file in it, for people."""

    def open_folder(self, name: bytes) -> "Step[SourceFolder]":
        """Opens a directory in it. Raises FileError."""

    def read_batch(self, *, with_data: bool = False) -> Step[list[tuple[bytes, Item]]]:
        """Returns the next names; none at the end. Raises FileError.

        with_data: their files will be opened soon, so the data of small ones may come along.
        """

    def open_reader(self, name: bytes, item: Item, chunk_bytes: int) -> Step[FileReader]:
        """Opens a file in it. Raises FileError."""

    def read_link(self, name: bytes) -> Step[bytes]:
        """Returns where a symbolic link in it leads. Raises FileError."""

    def read_xattrs(self, name: bytes) -> Step[Xattrs]:
        """Returns the extended attributes of a file or a directory in it; `.` is itself. Raises FileError."""

    def close(self) -> Step[None]:
        """Closes it."""


class SinkFolder(Protocol):
    """A directory that is filled. Close it after use."""

    @property
    def chunk_bytes(self) -> int:
        """The most that one put() may have."""

    def describe(self, name: bytes) -> str:
        """Returns the path of a file in it, for people."""

    def make_folder(self, name: bytes) -> "Step[tuple[SinkFolder, bool]]":
        """Makes a directory in it, or opens that of this name; whether it is new. Raises FileError."""

    def open_writer(self, name: bytes, item: Item) -> Step[FileWriter]:
        """Begins a file in it. Raises FileError, FullError."""

    def write_whole(self, name: bytes, item: Item, data: Piece) -> Step[bool]:
        """Writes a small file in one step; False where open_writer() must do it. Raises FileError, FullError."""

    def make_link(self, name: bytes, target: bytes, item: Item) -> Step[None]:
        """Makes a symbolic link in it, in place of another file of this name. Raises FileError, FullError."""

    def locate(self, name: bytes) -> bytes:
        """Returns the path of a file in it, for make_hard_link()."""

    def make_hard_link(self, name: bytes, first: bytes) -> Step[bool]:
        """Makes another name of a file of this copy; False where the destination cannot. Raises FileError."""

    def finish(self, item: Item) -> Step[None]:
        """Gives the directory itself its mode and times. Raises FileError."""

    def close(self) -> Step[None]:
        """Closes it."""


class SyncedFolder(SinkFolder, Protocol):
    """A directory that is made equal to another: what is in it can be looked at and deleted."""

    def make_folder(self, name: bytes) -> "Step[tuple[SyncedFolder, bool]]":
        """As SinkFolder.make_folder."""

    def enter(self, name: bytes) -> "Step[SyncedFolder]":
        """Opens a directory in it, and follows no link. Raises FileError."""

    def open_listing(self) -> Step[SourceFolder]:
        """Opens it for reading. Raises FileError."""

    def delete(self, name: bytes, *, is_folder: bool) -> Step[None]:
        """Deletes a file or a link in it, or an empty directory. Raises FileError."""

    def is_current(self, item: Item, old: Item) -> bool:
        """Whether a file that is there has the mode, the time and the owner that a copy of `item` would have."""

    def choose_xattrs(self, xattrs: Xattrs) -> Xattrs:
        """Returns the extended attributes that a copy here would have."""

    def set_metadata(self, name: bytes, item: Item) -> Step[None]:
        """Gives a regular file in it its mode and times. Raises FileError, FullError."""
