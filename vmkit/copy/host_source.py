"""The host as a source: reads its directories and files. Below the named path it follows no link."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from vmkit.copy.engine import Arrival, Step
from vmkit.copy.items import (
    CHANGED,
    KINDS,
    PAGE_BYTES_MAX,
    Descriptors,
    FileError,
    Item,
    ItemKind,
    Piece,
    WholeReader,
    join_path,
    refuse,
)
from vmkit.copy.wire import WHOLE_BYTES_MAX, Xattrs
from vmkit.copy.xattrs import read_host_xattrs

BATCH_NAMES = 1000
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY


def make_host_item(found: os.stat_result) -> Item:
    """Returns a file's metadata."""
    kind = KINDS.get(stat.S_IFMT(found.st_mode), ItemKind.OTHER)
    is_shared = kind == ItemKind.FILE and found.st_nlink > 1
    return Item(
        kind,
        found.st_size,
        stat.S_IMODE(found.st_mode),
        found.st_atime_ns,
        found.st_mtime_ns,
        found.st_uid,
        found.st_gid,
        (found.st_dev, found.st_ino) if is_shared else None,
    )


class HostFolder:
    """A directory of the host. Invariant: `_fd` is open until close().

    follows: names are the user's own, so links are followed. In a tree they are not.
    """

    def __init__(self, opened: Descriptors, fd: int, path: bytes, *, follows: bool) -> None:
        self._opened = opened
        self._fd = fd
        self._path = path
        self._follows = follows
        self._names: Iterator[bytes] | None = None

    def describe(self, name: bytes) -> str:
        return render_host_path(self._path, name)

    def open_folder(self, name: bytes) -> "Step[HostFolder]":
        yield from ()
        flags = FOLDER_FLAGS | (0 if self._follows else os.O_NOFOLLOW)
        try:
            fd = self._opened.open(name, flags, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error
        return HostFolder(self._opened, fd, join_path(self._path, name), follows=False)

    def read_batch(self, *, with_data: bool = False) -> Step[list[tuple[bytes, Item]]]:
        yield from ()
        found = []
        try:
            if self._names is None:
                self._names = iter(sorted(os.fsencode(name) for name in os.listdir(self._fd)))
            for name in self._names:
                # A file that vanishes between the two is no part of the directory any more.
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, make_host_item(os.stat(name, dir_fd=self._fd, follow_symlinks=False))))
                if len(found) >= BATCH_NAMES:
                    break
        except OSError as error:
            raise refuse(error) from error
        return found

    def open_reader(self, name: bytes, item: Item, chunk_bytes: int) -> "Step[HostReader | WholeReader]":
        yield from ()
        # A FIFO in place of the file must not hold up the copy.
        flags = os.O_RDONLY | os.O_NONBLOCK | (0 if self._follows else os.O_NOFOLLOW)
        try:
            fd = self._opened.open(name, flags, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error
        found = make_host_item(os.fstat(fd))
        if found.kind != ItemKind.FILE:
            self._opened.close(fd)
            raise FileError(f"it is a {found.kind} now")
        whole = self._read_whole(fd, found)
        if whole is not None:
            self._opened.close(fd)
            return whole
        return HostReader(self._opened, fd, found, chunk_bytes)

    def _read_whole(self, fd: int, item: Item) -> WholeReader | None:
        """Reads a small file at once; None where it is not what it seems, and HostReader finds out."""
        if item.size > WHOLE_BYTES_MAX:
            return None
        try:
            data = os.pread(fd, item.size + 1, 0)
        except OSError:
            return None
        found = os.fstat(fd)
        is_same = (found.st_size, found.st_mtime_ns) == (item.size, item.mtime_ns)
        return WholeReader(item, data, is_of_guest=False) if is_same and len(data) == item.size else None

    def read_link(self, name: bytes) -> Step[bytes]:
        yield from ()
        try:
            return os.readlink(name, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error

    def read_xattrs(self, name: bytes) -> Step[Xattrs]:
        yield from ()
        # `.` is no link, whatever leads there.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if self._follows else os.O_NOFOLLOW)
        try:
            fd = self._opened.open(name, flags, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error
        try:
            return read_host_xattrs(fd)
        finally:
            self._opened.close(fd)

    def close(self) -> Step[None]:
        yield from ()
        self._opened.close(self._fd)


def render_host_path(folder: bytes, name: bytes) -> str:
    """Returns a path of the host for people."""
    return os.fsdecode(join_path(folder, name))


class HostReader:
    """A file of the host. Holes are skipped, so that 1 TiB without data takes no time."""

    def __init__(self, opened: Descriptors, fd: int, item: Item, chunk_bytes: int) -> None:
        self.item = item
        self.end = item.size
        self.pending = 0
        self.can_ask = True
        self._opened = opened
        self._fd = fd
        self._chunk_bytes = chunk_bytes
        self._offset = 0
        self._data_end = 0
        self._arrived: list[tuple[int, Piece]] = []

    def has_room(self) -> bool:
        return True

    def ask(self) -> None:
        try:
            size = self._find_data()
            data = os.pread(self._fd, size, self._offset) if size else b""
        except OSError as error:
            raise refuse(error) from error
        if data:
            self._arrived.append((self._offset, data))
            self._offset += len(data)
        else:
            self.can_ask = False

    def _find_data(self) -> int:
        """Moves on to the next data; returns how much to read, 0 at the end."""
        if not self.item.size:
            # /proc
            return self._chunk_bytes
        if self._offset >= self.item.size:
            return 0
        if self._offset >= self._data_end:
            try:
                self._offset = os.lseek(self._fd, self._offset, os.SEEK_DATA)
                self._data_end = os.lseek(self._fd, self._offset, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    # From here to the end there is a hole.
                    self._offset = self.item.size
                    return 0
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._data_end = self.item.size
        return max(0, min(self._chunk_bytes, self._data_end - self._offset, self.item.size - self._offset))

    def take(self) -> list[tuple[int, Piece]]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def receive(self, arrival: Arrival) -> bool:
        return False

    def finish(self) -> Step[None]:
        yield from ()
        found = os.fstat(self._fd)
        is_same = (found.st_size, found.st_mtime_ns) == (self.item.size, self.item.mtime_ns)
        # Files of /proc and /sys have other sizes than they have data.
        if not is_same or (self._offset != self.item.size and self.item.size > PAGE_BYTES_MAX):
            raise FileError(CHANGED)
        self.end = self._offset
        self._close()

    def close(self) -> Step[None]:
        yield from ()
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._opened.close(self._fd)
            self._fd = -1
