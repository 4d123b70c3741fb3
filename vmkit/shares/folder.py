"""One folder of this host, as a guest may use it: what each protocol of shares does, and what none can get around.

Each request opens its file anew, by the names that lead there from the folder (vmkit.shares.beneath), and looks whether
it is the file that the guest means. So what the guest remembers costs no descriptor, and a folder that is moved out of
the share is out of reach at once. No device, no FIFO and no setuid bit comes about here, whatever the guest asks for.
Knows no protocol. Every function raises OSError, whose errno is the guest's answer.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vmkit.shares.beneath import PATH_ONLY, RENAME_EXCHANGE, RENAME_NOREPLACE, open_beneath, rename
from vmkit.shares.files import (
    MODE_BITS,
    TAKEN_FLAGS,
    Changes,
    change,
    find_key,
    find_status,
    is_writing,
    make_error,
    read_names,
    reopen,
)
from vmkit.shares.handles import OpenFile, OpenFiles, OpenFolder
from vmkit.shares.nodes import KnownFile, KnownFiles

NAME_MAX = 255
TARGET_MAX = 4095
# The body of one read.
DATA_MAX = 1 << 20
DOTS = (b".", b"..")
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Owners that are not the sharing user, and their groups.
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Owner:
    """The user of this host who shares: that user's files are root's in the guest, and all others uid 65534's."""

    uid: int
    gids: frozenset[int]

    def squash(self, status: os.stat_result) -> tuple[int, int, int]:
        """Mode, uid and gid in the guest. No file has the setuid bit there."""
        mode = status.st_mode & ~(stat.S_ISUID | stat.S_ISGID)
        return mode, 0 if status.st_uid == self.uid else NOBODY, 0 if status.st_gid in self.gids else NOBODY


class SharedFolder:
    """Invariant: every descriptor but the folder's own is in `handles`, or closed when a function returns."""

    def __init__(self, folder: int, nodes: KnownFiles, *, is_read_only: bool) -> None:
        """folder: an open directory, which stays the caller's. nodes: of its key."""
        self.nodes = nodes
        self.handles = OpenFiles()
        self.owner = Owner(os.geteuid(), frozenset((os.getegid(), *os.getgroups())))
        self._folder = folder
        self._is_read_only = is_read_only

    def close(self) -> None:
        """Closes all that the guest has open."""
        self.handles.close_all()

    def check_change(self, *names: bytes) -> None:
        """For a request that changes something, by names of one step."""
        if self._is_read_only:
            raise make_error(errno.EROFS)
        self.check_names(*names)

    def check_names(self, *names: bytes) -> None:
        """A name is one step: neither up nor further down."""
        for name in names:
            if len(name) > NAME_MAX:
                raise make_error(errno.ENAMETOOLONG)
            if not name or name in DOTS or b"/" in name or b"\0" in name:
                raise make_error(errno.EINVAL)

    # The way to a file.

    @contextlib.contextmanager
    def reach(self, node: KnownFile, flags: int = PATH_ONLY) -> Iterator[int]:
        """The file of a node, opened for the block; ESTALE, where another one has its place."""
        fd = open_beneath(self._folder, self.nodes.find_path(node), flags)
        try:
            if find_key(os.fstat(fd)) != node.key:
                raise make_error(errno.ESTALE)
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def hold(self, node: KnownFile) -> Iterator[int]:
        """The file of a node, also of one that has no name any more and is open."""
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(self.reach(node))
            except OSError as error:
                if not node.files:
                    # On ESTALE the kernel walks the path once more.
                    code = errno.ESTALE if error.errno == errno.ENOENT else error.errno or errno.EIO
                    raise make_error(code) from error
                fd = node.files[-1]
            yield fd

    # Names.

    def look_up(self, parent: KnownFile, name: bytes) -> tuple[KnownFile, os.stat_result]:
        """The node of a name, of which the guest is told."""
        self.check_names(name)
        fd = open_beneath(self._folder, [*self.nodes.find_path(parent), name])
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return self.nodes.remember(parent, name, find_key(status)), status

    def read_link(self, node: KnownFile) -> bytes:
        with self.reach(node) as fd:
            return os.readlink(b"", dir_fd=fd)[:TARGET_MAX]

    def make_link(self, parent: KnownFile, name: bytes, target: bytes) -> None:
        """The text of a link is the guest's, which follows it in its own files."""
        self.check_change(name)
        with self.reach(parent) as fd:
            os.symlink(target, name, dir_fd=fd)

    def make_file(self, parent: KnownFile, name: bytes, mode: int) -> None:
        """A regular one, and no other kind."""
        self.check_change(name)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise make_error(errno.EPERM)
        with self.reach(parent) as fd:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(name, flags, mode & MODE_BITS, dir_fd=fd))

    def make_folder(self, parent: KnownFile, name: bytes, mode: int) -> None:
        self.check_change(name)
        with self.reach(parent) as fd:
            os.mkdir(name, mode & MODE_BITS, dir_fd=fd)

    def unlink(self, parent: KnownFile, name: bytes) -> None:
        self.check_change(name)
        with self.reach(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.unlink(name, dir_fd=fd)
        if status.st_nlink == 1:
            self.nodes.remove(find_key(status))

    def remove_folder(self, parent: KnownFile, name: bytes) -> None:
        self.check_change(name)
        with self.reach(parent) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.rmdir(name, dir_fd=fd)
        self.nodes.remove(find_key(status))

    def rename(self, before: KnownFile, old: bytes, after: KnownFile, new: bytes, flags: int = 0) -> None:
        self.check_change(old, new)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise make_error(errno.EINVAL)
        with self.reach(before) as source, self.reach(after) as target:
            moved = os.stat(old, dir_fd=source, follow_symlinks=False)
            replaced = find_status(new, target)
            rename(source, old, target, new, flags)
        if replaced is not None and find_key(replaced) != find_key(moved):
            if flags & RENAME_EXCHANGE:
                self.nodes.move(find_key(replaced), before, old)
            elif replaced.st_nlink == 1 or stat.S_ISDIR(replaced.st_mode):
                self.nodes.remove(find_key(replaced))
        self.nodes.move(find_key(moved), after, new)

    def link(self, node: KnownFile, parent: KnownFile, name: bytes) -> None:
        """Both names are beneath the folder."""
        self.check_change(name)
        if node is self.nodes.root:
            raise make_error(errno.EPERM)
        with self.reach(node), self.reach(self.nodes.find(node.parent)) as source, self.reach(parent) as target:
            os.link(node.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    # Attributes.

    def find_status(self, node: KnownFile) -> os.stat_result:
        with self.hold(node) as fd:
            return os.fstat(fd)

    def change(self, node: KnownFile, changes: Changes, handle: int | None = None) -> os.stat_result:
        """Owners stay as they are: all that a guest makes is the sharing user's. A chown seems to succeed.

        handle: an open file, whose own descriptor sets the size.
        """
        self.check_change()
        if changes.size is not None and handle is not None:
            os.ftruncate(self.handles.find_file(handle).fd, changes.size)
            changes = replace(changes, size=None)
        with self.hold(node) as fd:
            change(fd, changes)
            return os.fstat(fd)

    def find_space(self) -> os.statvfs_result:
        return os.fstatvfs(self._folder)

    # Files.

    def open(self, node: KnownFile, flags: int) -> tuple[int, bool]:
        """The number of the open file, and whether it is as it was when the guest opened it last."""
        self.handles.check_room()
        if self._is_read_only and is_writing(flags):
            raise make_error(errno.EROFS)
        with self.reach(node) as fd:
            opened = reopen(fd, flags, is_quiet=self._is_read_only)
        status = os.fstat(opened)
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        is_known, node.seen = node.seen == seen, seen
        return self.handles.add(OpenFile(node, opened)), is_known

    def create(
        self, parent: KnownFile, name: bytes, flags: int, mode: int
    ) -> tuple[KnownFile, os.stat_result, int, bool]:
        """The node, its attributes, and what open() returns."""
        self.check_change(name)
        self.handles.check_room()
        taken = flags & TAKEN_FLAGS | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with self.reach(parent) as fd:
                made = os.open(name, taken, mode & 0o777, dir_fd=fd)
        except FileExistsError:
            # A program of the host was faster.
            if flags & os.O_EXCL:
                raise
            node, status = self.look_up(parent, name)
            try:
                return node, status, *self.open(node, flags)
            except OSError:
                self.nodes.forget(node.number, 1)
                raise
        try:
            status = os.fstat(made)
            node = self.nodes.remember(parent, name, find_key(status))
        except OSError:
            os.close(made)
            raise
        return node, status, self.handles.add(OpenFile(node, made)), False

    def read(self, handle: int, size: int, offset: int) -> bytes:
        return os.pread(self.handles.find_file(handle).fd, min(size, DATA_MAX), offset)

    def write(self, handle: int, data: memoryview, offset: int) -> int:
        self.check_change()
        return os.pwrite(self.handles.find_file(handle).fd, data, offset)

    def sync(self, handle: int) -> None:
        os.fsync(self.handles.find_file(handle).fd)

    # Folders.

    def open_folder(self, node: KnownFile) -> int:
        """The number of a listing."""
        self.handles.check_listings()
        with self.reach(node, FOLDER_FLAGS):
            return self.handles.add(OpenFolder(node))

    @contextlib.contextmanager
    def list(self, handle: int, offset: int) -> Iterator[tuple[OpenFolder, int]]:
        """The listing, and its folder opened for the block. offset: the number of names that the guest has already."""
        listing = self.handles.find_listing(handle)
        with self.reach(listing.node, FOLDER_FLAGS) as fd:
            if not offset or not listing.is_read:
                self.handles.list_names(listing, read_names(fd))
            yield listing, fd
