"""The host as a destination. What a guest sends is written below the destination's directory and nowhere else.

Each name is used relative to the open directory above it, and no link is followed. A file has a temporary name until it
is whole.
"""

import contextlib
import errno
import os
import stat

from vmkit.copy.engine import Arrival, Step
from vmkit.copy.host_source import FOLDER_FLAGS, HostFolder, render_host_path
from vmkit.copy.items import (
    Descriptors,
    FileError,
    FullError,
    Item,
    Keep,
    Piece,
    is_same_metadata,
    join_path,
    make_temporary_name,
    refuse,
)
from vmkit.copy.wire import CHUNK_BYTES_MAX, Xattrs
from vmkit.copy.xattrs import choose_for_host, set_host_xattrs

# setuid, setgid and the sticky bit of an untrusted guest mean nothing here.
MODE_MASK = 0o777
BLOCK_BYTES = 4096
ZERO_BLOCK = bytes(BLOCK_BYTES)
FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse_write(error: OSError) -> FileError | FullError:
    """Returns the error of a write: a full disk ends the whole copy."""
    if error.errno in FULL:
        return FullError(os.strerror(error.errno))
    return refuse(error)


class HostSink:
    """What all directories of a copy to the host share. unfinished: temporary files, by directory and name."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.opened = Descriptors()
        self.unfinished: set[tuple[int, bytes]] = set()

    def clean_up(self) -> None:
        """Removes the temporary files that an interrupted copy has left, and closes what is open."""
        for fd, name in list(self.unfinished):
            self.remove(fd, name)
        self.opened.close_all()

    def remove(self, fd: int, name: bytes) -> None:
        """Removes a temporary file; one that is not there is no fault."""
        self.unfinished.discard((fd, name))
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=fd)

    def keep_metadata(self, file: int | str, item: Item) -> None:
        """Gives a file what a copy keeps: an open one, or by its path in /proc/self/fd. Raises OSError, FileError."""
        if self.keep.owners and item.uid is not None and item.gid is not None:
            os.chown(file, item.uid, item.gid)
        # Before the mode, which may not let its owner write them.
        set_host_xattrs(file, item.xattrs)
        os.chmod(file, item.mode & MODE_MASK)  # noqa: PTH101  (of a descriptor)
        os.utime(file, ns=(item.atime_ns, item.mtime_ns))


class HostSinkFolder:
    """A directory of the host. Invariant: `_fd` is open until close(), which removes unfinished files in it."""

    def __init__(self, sink: HostSink, fd: int, path: bytes) -> None:
        self._sink = sink
        self._fd = fd
        self._path = path
        self.chunk_bytes = CHUNK_BYTES_MAX

    def describe(self, name: bytes) -> str:
        return render_host_path(self._path, name)

    def make_folder(self, name: bytes) -> "Step[tuple[HostSinkFolder, bool]]":
        yield from ()
        is_new = False
        try:
            if name != b".":
                with contextlib.suppress(FileExistsError):
                    # Writable for its owner until it is full.
                    os.mkdir(name, 0o700, dir_fd=self._fd)
                    is_new = True
            fd = self._sink.opened.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise FileError("a file or a link that is not a directory has this name") from error
            raise refuse_write(error) from error
        return HostSinkFolder(self._sink, fd, join_path(self._path, name)), is_new

    def open_writer(self, name: bytes, item: Item) -> "Step[HostWriter]":
        yield from ()
        temporary = make_temporary_name()
        self._sink.unfinished.add((self._fd, temporary))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            fd = self._sink.opened.open(temporary, flags, 0o600, dir_fd=self._fd)
        except OSError as error:
            self._sink.unfinished.discard((self._fd, temporary))
            raise refuse_write(error) from error
        return HostWriter(self._sink, self, name, temporary, fd)

    def write_whole(self, name: bytes, item: Item, data: Piece) -> Step[bool]:
        # A system call costs no exchange, so one way is enough.
        yield from ()
        return False

    def make_link(self, name: bytes, target: bytes, item: Item) -> Step[None]:
        yield from ()
        temporary = make_temporary_name()
        self._sink.unfinished.add((self._fd, temporary))
        try:
            os.symlink(target, temporary, dir_fd=self._fd)
            if self._sink.keep.owners and item.uid is not None and item.gid is not None:
                os.chown(temporary, item.uid, item.gid, dir_fd=self._fd, follow_symlinks=False)
            os.utime(temporary, ns=(item.atime_ns, item.mtime_ns), dir_fd=self._fd, follow_symlinks=False)
            self.commit(temporary, name)
        except OSError as error:
            raise refuse_write(error) from error
        finally:
            self.remove(temporary)

    def enter(self, name: bytes) -> "Step[HostSinkFolder]":
        yield from ()
        try:
            fd = self._sink.opened.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error
        return HostSinkFolder(self._sink, fd, join_path(self._path, name))

    def open_listing(self) -> Step[HostFolder]:
        yield from ()
        try:
            fd = self._sink.opened.open(b".", FOLDER_FLAGS, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error
        return HostFolder(self._sink.opened, fd, self._path, follows=False)

    def delete(self, name: bytes, *, is_folder: bool) -> Step[None]:
        yield from ()
        try:
            (os.rmdir if is_folder else os.unlink)(name, dir_fd=self._fd)
        except OSError as error:
            raise refuse(error) from error

    def is_current(self, item: Item, old: Item) -> bool:
        return is_same_metadata(item, old, MODE_MASK, has_owners=self._sink.keep.owners)

    def choose_xattrs(self, xattrs: Xattrs) -> Xattrs:
        return choose_for_host(xattrs)

    def set_metadata(self, name: bytes, item: Item) -> Step[None]:
        yield from ()
        try:
            fd = self._sink.opened.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._fd)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise FileError("it is no regular file now")
                self._sink.keep_metadata(f"/proc/self/fd/{fd}", item)
            finally:
                self._sink.opened.close(fd)
        except OSError as error:
            raise refuse_write(error) from error

    def locate(self, name: bytes) -> bytes:
        return join_path(self._path, name)

    def make_hard_link(self, name: bytes, first: bytes) -> Step[bool]:
        # SFTP 3 does not tell which files of a guest are one file.
        yield from ()
        return False

    def remove(self, temporary: bytes) -> None:
        """Removes a temporary file, unless commit() has renamed it."""
        if (self._fd, temporary) in self._sink.unfinished:
            self._sink.remove(self._fd, temporary)

    def commit(self, temporary: bytes, name: bytes) -> None:
        """Gives a temporary file its name, in place of another file. Raises OSError."""
        os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self._sink.unfinished.discard((self._fd, temporary))
        if self._sink.keep.fsync:
            os.fsync(self._fd)

    def finish(self, item: Item) -> Step[None]:
        yield from ()
        try:
            self._sink.keep_metadata(self._fd, item)
        except OSError as error:
            raise refuse(error) from error

    def close(self) -> Step[None]:
        yield from ()
        for fd, name in [one for one in self._sink.unfinished if one[0] == self._fd]:
            self._sink.remove(fd, name)
        self._sink.opened.close(self._fd)


class HostWriter:
    """A file in the making. Blocks of zeros become holes."""

    def __init__(self, sink: HostSink, folder: HostSinkFolder, name: bytes, temporary: bytes, fd: int) -> None:
        self.pending = 0
        self._sink = sink
        self._folder = folder
        self._name = name
        self._temporary = temporary
        self._fd = fd

    def has_room(self) -> bool:
        return True

    def put(self, offset: int, data: Piece) -> None:
        try:
            for start, end in find_data(data):
                at = start
                while at < end:
                    at += os.pwrite(self._fd, memoryview(data)[at:end], offset + at)
        except OSError as error:
            raise refuse_write(error) from error

    def receive(self, arrival: Arrival) -> None:
        pass

    def finish(self, item: Item, size: int) -> Step[None]:
        yield from ()
        try:
            os.ftruncate(self._fd, size)
            self._sink.keep_metadata(self._fd, item)
            if self._sink.keep.fsync:
                os.fsync(self._fd)
            self._folder.commit(self._temporary, self._name)
        except OSError as error:
            raise refuse_write(error) from error
        self._close()

    def drop(self) -> Step[None]:
        yield from ()
        self._close()
        self._folder.remove(self._temporary)

    def _close(self) -> None:
        if self._fd >= 0:
            self._sink.opened.close(self._fd)
            self._fd = -1


def find_data(data: Piece) -> list[tuple[int, int]]:
    """Returns the ranges of a piece without its whole blocks of zeros."""
    ranges: list[tuple[int, int]] = []
    began: int | None = None
    size = len(data)
    for at in range(0, size, BLOCK_BYTES):
        end = min(at + BLOCK_BYTES, size)
        is_zero = not data[at] and not data[end - 1] and bytes(data[at:end]) == ZERO_BLOCK[: end - at]
        if is_zero and began is not None:
            ranges.append((began, at))
            began = None
        elif not is_zero and began is None:
            began = at
    if began is not None:
        ranges.append((began, size))
    return ranges
