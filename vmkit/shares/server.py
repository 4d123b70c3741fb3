"""Answers a guest's FUSE requests from one folder of this host, and from nothing else.

Each request opens its file anew, by the names that lead there from the folder (vmkit.shares.beneath), and looks whether
it is the file that the guest means. So what the guest remembers costs no descriptor, and a folder that is moved out of
the share is out of reach at once. No device, no FIFO and no setuid bit comes about here, whatever the guest asks for.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from vmkit.shares.beneath import PATH_ONLY, RENAME_EXCHANGE, RENAME_NOREPLACE, open_beneath, rename
from vmkit.shares.files import (
    MODE_BITS,
    TAKEN_FLAGS,
    change,
    find_key,
    find_status,
    is_writing,
    make_error,
    read_names,
    reopen,
)
from vmkit.shares.fuse import (
    DATA_MAX,
    KEEP_CACHE,
    MAJOR,
    NAME_MAX,
    SILENT,
    TARGET_MAX,
    Feature,
    FuseRequest,
    Op,
    Owner,
    Set,
    Wire,
)
from vmkit.shares.handles import OpenFile, OpenFiles, OpenFolder
from vmkit.shares.nodes import KnownFile, KnownFiles

WANTED = (
    Feature.ASYNC_READ
    | Feature.ATOMIC_O_TRUNC
    | Feature.BIG_WRITES
    | Feature.AUTO_INVAL_DATA
    | Feature.DO_READDIRPLUS
    | Feature.READDIRPLUS_AUTO
    | Feature.PARALLEL_DIROPS
    | Feature.HANDLE_KILLPRIV
    | Feature.MAX_PAGES
    | Feature.CACHE_SYMLINKS
)
CHANGES = frozenset(
    (
        *(Op.SETATTR, Op.SYMLINK, Op.MKNOD, Op.MKDIR, Op.UNLINK, Op.RMDIR, Op.RENAME, Op.RENAME2, Op.LINK),
        *(Op.CREATE, Op.WRITE),
    )
)
DOTS = (b".", b"..")
ALL_ATTRIBUTES = (1 << 9) - 1
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class FolderServer:
    """Invariant: every descriptor but the folder's own is in `_handles`, or closed when answer() returns."""

    def __init__(self, folder: int, wire: Wire, *, is_read_only: bool) -> None:
        """folder: an open directory, which stays the caller's. wire: of the guest's byte order."""
        self._wire = wire
        self._folder = folder
        self._is_read_only = is_read_only
        self._owner = Owner(os.geteuid(), frozenset((os.getegid(), *os.getgroups())))
        self._nodes = KnownFiles(find_key(os.fstat(folder)))
        self._handles = OpenFiles()
        self._answers: dict[int, Callable[[FuseRequest], bytes]] = {
            Op.LOOKUP: self._look_up,
            Op.GETATTR: self._get_attributes,
            Op.SETATTR: self._set_attributes,
            Op.READLINK: self._read_link,
            Op.SYMLINK: self._make_link,
            Op.MKNOD: self._make_node,
            Op.MKDIR: self._make_folder,
            Op.UNLINK: self._unlink,
            Op.RMDIR: self._remove_folder,
            Op.RENAME: self._rename,
            Op.RENAME2: self._rename,
            Op.LINK: self._link,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.WRITE: self._write,
            Op.STATFS: self._tell_statistics,
            Op.RELEASE: self._release,
            Op.RELEASEDIR: self._release,
            Op.FSYNC: self._sync,
            Op.FSYNCDIR: lambda _request: b"",
            Op.OPENDIR: self._open_folder,
            Op.READDIR: self._list,
            Op.READDIRPLUS: self._list,
            Op.CREATE: self._create,
            Op.DESTROY: lambda _request: b"",
        }

    def close(self) -> None:
        """Closes all that the guest has open."""
        self._handles.close_all()

    def answer(self, message: memoryview) -> bytes:
        """The answer to one message; empty where it has none. Raises ProtocolError."""
        request = self._wire.parse(message)
        if request.opcode in SILENT:
            self._forget(request)
            return b""
        if request.opcode == Op.INIT:
            return self._begin(request)
        handler = self._answers.get(request.opcode)
        # The kernel remembers that, and asks no more: xattrs, locks, fallocate, ioctls.
        code = errno.ENOSYS
        if handler is not None:
            try:
                self._check(request)
                return self._wire.render(request.unique, handler(request))
            except OSError as error:
                code = error.errno or errno.EIO
            except (OverflowError, ValueError):
                # A number or a name that no system call takes.
                code = errno.EINVAL
        return self._wire.render_error(request.unique, code)

    def _check(self, request: FuseRequest) -> None:
        """Raises OSError."""
        if self._is_read_only and request.opcode in CHANGES:
            raise make_error(errno.EROFS)
        names = request.names[:1] if request.opcode == Op.SYMLINK else request.names
        for name in names:
            if len(name) > NAME_MAX:
                raise make_error(errno.ENAMETOOLONG)
            if not name or name in DOTS or b"/" in name:
                raise make_error(errno.EINVAL)

    def _begin(self, request: FuseRequest) -> bytes:
        major, _, _, offered = request.numbers
        if major != MAJOR:
            return self._wire.render_error(request.unique, errno.EPROTO)
        return self._wire.render(request.unique, self._wire.render_init(WANTED & offered))

    def _forget(self, request: FuseRequest) -> None:
        if request.opcode == Op.FORGET:
            self._nodes.forget(request.node, request.numbers[0])
        elif request.opcode == Op.BATCH_FORGET:
            for number, count in self._wire.parse_forgotten(request):
                self._nodes.forget(number, count)

    # The way to a file.

    @contextlib.contextmanager
    def _reach(self, node: KnownFile, flags: int = PATH_ONLY) -> Iterator[int]:
        """The file of a node, opened for the block. Raises OSError: ESTALE, where another one has its place."""
        fd = open_beneath(self._folder, self._nodes.find_path(node), flags)
        try:
            if find_key(os.fstat(fd)) != node.key:
                raise make_error(errno.ESTALE)
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _hold(self, node: KnownFile) -> Iterator[int]:
        """The file of a node, also of one that has no name any more and is open. Raises OSError."""
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(self._reach(node))
            except OSError as error:
                if not node.files:
                    # On ESTALE the kernel walks the path once more.
                    code = errno.ESTALE if error.errno == errno.ENOENT else error.errno or errno.EIO
                    raise make_error(code) from error
                fd = node.files[-1]
            yield fd

    def _find_entry(self, parent: KnownFile, name: bytes) -> tuple[KnownFile, os.stat_result]:
        """The node of a name, of which the guest is told. Raises OSError."""
        fd = open_beneath(self._folder, [*self._nodes.find_path(parent), name])
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        return self._nodes.remember(parent, name, find_key(status)), status

    def _render_entry(self, node: KnownFile, status: os.stat_result) -> bytes:
        return self._wire.render_entry(node.number, self._wire.render_attributes(status, self._owner))

    def _tell_entry(self, parent: KnownFile, name: bytes) -> bytes:
        """What the guest is told of a name. Raises OSError."""
        return self._render_entry(*self._find_entry(parent, name))

    # Names.

    def _look_up(self, request: FuseRequest) -> bytes:
        return self._tell_entry(self._nodes.find(request.node), request.names[0])

    def _read_link(self, request: FuseRequest) -> bytes:
        with self._reach(self._nodes.find(request.node)) as fd:
            return os.readlink(b"", dir_fd=fd)[:TARGET_MAX]

    def _make_link(self, request: FuseRequest) -> bytes:
        """The text of a link is the guest's, which follows it in its own files."""
        name, target = request.names
        parent = self._nodes.find(request.node)
        with self._reach(parent) as fd:
            os.symlink(target, name, dir_fd=fd)
        return self._tell_entry(parent, name)

    def _make_node(self, request: FuseRequest) -> bytes:
        mode, name = request.numbers[0], request.names[0]
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise make_error(errno.EPERM)
        parent = self._nodes.find(request.node)
        with self._reach(parent) as fd:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(name, flags, mode & MODE_BITS, dir_fd=fd))
        return self._tell_entry(parent, name)

    def _make_folder(self, request: FuseRequest) -> bytes:
        parent, name = self._nodes.find(request.node), request.names[0]
        with self._reach(parent) as fd:
            os.mkdir(name, request.numbers[0] & MODE_BITS, dir_fd=fd)
        return self._tell_entry(parent, name)

    def _unlink(self, request: FuseRequest) -> bytes:
        name = request.names[0]
        with self._reach(self._nodes.find(request.node)) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.unlink(name, dir_fd=fd)
        if status.st_nlink == 1:
            self._nodes.remove(find_key(status))
        return b""

    def _remove_folder(self, request: FuseRequest) -> bytes:
        name = request.names[0]
        with self._reach(self._nodes.find(request.node)) as fd:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            os.rmdir(name, dir_fd=fd)
        self._nodes.remove(find_key(status))
        return b""

    def _rename(self, request: FuseRequest) -> bytes:
        flags = request.numbers[1] if request.opcode == Op.RENAME2 else 0
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise make_error(errno.EINVAL)
        old, new = request.names
        before, after = self._nodes.find(request.node), self._nodes.find(request.numbers[0])
        with self._reach(before) as source, self._reach(after) as target:
            moved = os.stat(old, dir_fd=source, follow_symlinks=False)
            replaced = find_status(new, target)
            rename(source, old, target, new, flags)
        if replaced is not None and find_key(replaced) != find_key(moved):
            if flags & RENAME_EXCHANGE:
                self._nodes.move(find_key(replaced), before, old)
            elif replaced.st_nlink == 1 or stat.S_ISDIR(replaced.st_mode):
                self._nodes.remove(find_key(replaced))
        self._nodes.move(find_key(moved), after, new)
        return b""

    def _link(self, request: FuseRequest) -> bytes:
        """Both names are beneath the folder."""
        node, parent, name = self._nodes.find(request.numbers[0]), self._nodes.find(request.node), request.names[0]
        if node is self._nodes.root:
            raise make_error(errno.EPERM)
        with self._reach(node), self._reach(self._nodes.find(node.parent)) as source, self._reach(parent) as target:
            os.link(node.name, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        return self._tell_entry(parent, name)

    # Attributes.

    def _get_attributes(self, request: FuseRequest) -> bytes:
        with self._hold(self._nodes.find(request.node)) as fd:
            return self._wire.render_lifetime() + self._wire.render_attributes(os.fstat(fd), self._owner)

    def _set_attributes(self, request: FuseRequest) -> bytes:
        """Owners stay as they are: all that a guest makes is the sharing user's. A chown seems to succeed."""
        valid, _, handle, size, _, *rest = request.numbers
        wanted = Set(valid & ALL_ATTRIBUTES)
        if wanted & Set.SIZE and wanted & Set.HANDLE:
            os.ftruncate(self._handles.find_file(handle).fd, size)
            wanted &= ~Set.SIZE
        with self._hold(self._nodes.find(request.node)) as fd:
            change(fd, wanted, size, rest)
            return self._wire.render_lifetime() + self._wire.render_attributes(os.fstat(fd), self._owner)

    def _tell_statistics(self, _request: FuseRequest) -> bytes:
        return self._wire.render_statistics(os.fstatvfs(self._folder))

    # Files.

    def _open(self, request: FuseRequest) -> bytes:
        return self._open_node(self._nodes.find(request.node), request.numbers[0])

    def _open_node(self, node: KnownFile, flags: int) -> bytes:
        self._handles.check_room()
        if self._is_read_only and is_writing(flags):
            raise make_error(errno.EROFS)
        with self._reach(node) as fd:
            opened = reopen(fd, flags, is_quiet=self._is_read_only)
        status = os.fstat(opened)
        seen = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        is_known, node.seen = node.seen == seen, seen
        return self._wire.render_opened(self._handles.add(OpenFile(node, opened)), KEEP_CACHE if is_known else 0)

    def _create(self, request: FuseRequest) -> bytes:
        flags, mode, _, _ = request.numbers
        self._handles.check_room()
        parent, name = self._nodes.find(request.node), request.names[0]
        taken = flags & TAKEN_FLAGS | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with self._reach(parent) as fd:
                made = os.open(name, taken, mode & 0o777, dir_fd=fd)
        except FileExistsError:
            # A program of the host was faster.
            if flags & os.O_EXCL:
                raise
            node, status = self._find_entry(parent, name)
            return self._render_entry(node, status) + self._open_node(node, flags)
        try:
            status = os.fstat(made)
            node = self._nodes.remember(parent, name, find_key(status))
        except OSError:
            os.close(made)
            raise
        return self._render_entry(node, status) + self._wire.render_opened(self._handles.add(OpenFile(node, made)))

    def _read(self, request: FuseRequest) -> bytes:
        handle, offset, size, *_ = request.numbers
        return os.pread(self._handles.find_file(handle).fd, min(size, DATA_MAX), offset)

    def _write(self, request: FuseRequest) -> bytes:
        handle, offset, size, *_ = request.numbers
        return self._wire.render_written(os.pwrite(self._handles.find_file(handle).fd, request.data[:size], offset))

    def _sync(self, request: FuseRequest) -> bytes:
        os.fsync(self._handles.find_file(request.numbers[0]).fd)
        return b""

    def _release(self, request: FuseRequest) -> bytes:
        self._handles.close(request.numbers[0])
        return b""

    # Folders.

    def _open_folder(self, request: FuseRequest) -> bytes:
        node = self._nodes.find(request.node)
        self._handles.check_listings()
        with self._reach(node, FOLDER_FLAGS):
            return self._wire.render_opened(self._handles.add(OpenFolder(node)))

    def _list(self, request: FuseRequest) -> bytes:
        """As many names as have room, from an offset on: the number of names before."""
        handle, offset, size, *_ = request.numbers
        listing, has_entries = self._handles.find_listing(handle), request.opcode == Op.READDIRPLUS
        room = min(size, DATA_MAX)
        answer = bytearray()
        with self._reach(listing.node, FOLDER_FLAGS) as fd:
            if not offset or not listing.is_read:
                self._handles.list_names(listing, read_names(fd))
            for index in range(offset, len(listing.names)):
                name, inode, kind = listing.names[index]
                rendered = self._wire.render_name(inode, index + 1, name, kind)
                room -= len(rendered) + (len(self._wire.nothing) if has_entries else 0)
                if room < 0:
                    break
                if has_entries:
                    answer += self._tell_listed(listing.node, name, fd)
                answer += rendered
        return bytes(answer)

    def _tell_listed(self, parent: KnownFile, name: bytes, fd: int) -> bytes:
        """The entry of a listed name; an empty one where the guest has to ask, as for another file system's root."""
        status = None if name in DOTS else find_status(name, fd)
        if status is None or status.st_dev != parent.key[0]:
            return self._wire.nothing
        try:
            return self._render_entry(self._nodes.remember(parent, name, find_key(status)), status)
        except OSError:
            return self._wire.nothing
