"""Answers a guest's FUSE requests from one folder of this host (vmkit.shares.folder), and from nothing else."""

import errno
import os
import time
from collections.abc import Callable

from vmkit.shares.files import Changes, find_key, find_status, read_time
from vmkit.shares.folder import DATA_MAX, DOTS, SharedFolder
from vmkit.shares.fuse import KEEP_CACHE, MAJOR, SILENT, Feature, FuseRequest, Messages, Op, Set, Wire
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
ALL_ATTRIBUTES = (1 << 9) - 1


class FuseSpeaker:
    """One guest's FUSE: its messages, and the server that answers them once the first has shown their byte order."""

    def __init__(self, folder: int, *, is_read_only: bool) -> None:
        """folder: an open directory, which stays the caller's."""
        self.messages = Messages()
        # vshd has mounted it before it answered.
        self.is_mounted = True
        self._folder = folder
        self._is_read_only = is_read_only
        self._server: FolderServer | None = None

    def answer(self, message: memoryview) -> bytes:
        """The answer to one message; empty where it has none. Raises ProtocolError."""
        if self._server is None:
            self._server = FolderServer(self._folder, Wire(self.messages.order), is_read_only=self._is_read_only)
        return self._server.answer(message)

    def close(self) -> None:
        """Closes all that the guest has open."""
        if self._server is not None:
            self._server.close()


class FolderServer:
    """FUSE's requests, in terms of the folder."""

    def __init__(self, folder: int, wire: Wire, *, is_read_only: bool) -> None:
        """folder: an open directory, which stays the caller's. wire: of the guest's byte order."""
        self._wire = wire
        self._nodes = KnownFiles(find_key(os.fstat(folder)))
        self._folder = SharedFolder(folder, self._nodes, is_read_only=is_read_only)
        self._handles = self._folder.handles
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
        self._folder.close()

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
                return self._wire.render(request.unique, handler(request))
            except OSError as error:
                code = error.errno or errno.EIO
            except (OverflowError, ValueError):
                # A number or a name that no system call takes.
                code = errno.EINVAL
        return self._wire.render_error(request.unique, code)

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

    def _find(self, request: FuseRequest) -> KnownFile:
        return self._nodes.find(request.node)

    def _render_entry(self, node: KnownFile, status: os.stat_result) -> bytes:
        return self._wire.render_entry(node.number, self._wire.render_attributes(status, self._folder.owner))

    def _render_status(self, status: os.stat_result) -> bytes:
        return self._wire.render_lifetime() + self._wire.render_attributes(status, self._folder.owner)

    def _tell_entry(self, parent: KnownFile, name: bytes) -> bytes:
        """What the guest is told of a name. Raises OSError."""
        return self._render_entry(*self._folder.look_up(parent, name))

    # Names.

    def _look_up(self, request: FuseRequest) -> bytes:
        return self._tell_entry(self._find(request), request.names[0])

    def _read_link(self, request: FuseRequest) -> bytes:
        return self._folder.read_link(self._find(request))

    def _make_link(self, request: FuseRequest) -> bytes:
        parent, (name, target) = self._find(request), request.names
        self._folder.make_link(parent, name, target)
        return self._tell_entry(parent, name)

    def _make_node(self, request: FuseRequest) -> bytes:
        parent, name = self._find(request), request.names[0]
        self._folder.make_file(parent, name, request.numbers[0])
        return self._tell_entry(parent, name)

    def _make_folder(self, request: FuseRequest) -> bytes:
        parent, name = self._find(request), request.names[0]
        self._folder.make_folder(parent, name, request.numbers[0])
        return self._tell_entry(parent, name)

    def _unlink(self, request: FuseRequest) -> bytes:
        self._folder.unlink(self._find(request), request.names[0])
        return b""

    def _remove_folder(self, request: FuseRequest) -> bytes:
        self._folder.remove_folder(self._find(request), request.names[0])
        return b""

    def _rename(self, request: FuseRequest) -> bytes:
        flags = request.numbers[1] if request.opcode == Op.RENAME2 else 0
        old, new = request.names
        self._folder.rename(self._find(request), old, self._nodes.find(request.numbers[0]), new, flags)
        return b""

    def _link(self, request: FuseRequest) -> bytes:
        node, parent, name = self._nodes.find(request.numbers[0]), self._find(request), request.names[0]
        self._folder.link(node, parent, name)
        return self._tell_entry(parent, name)

    # Attributes.

    def _get_attributes(self, request: FuseRequest) -> bytes:
        return self._render_status(self._folder.find_status(self._find(request)))

    def _set_attributes(self, request: FuseRequest) -> bytes:
        valid, _, handle, size, _, accessed, modified, _, accessed_ns, modified_ns, _, mode, *_ = request.numbers
        wanted, now_ns = Set(valid & ALL_ATTRIBUTES), time.time_ns()
        times: list[int | None] = [None, None]
        if wanted & Set.ATIME:
            times[0] = now_ns if wanted & Set.ATIME_NOW else read_time(accessed, accessed_ns)
        if wanted & Set.MTIME:
            times[1] = now_ns if wanted & Set.MTIME_NOW else read_time(modified, modified_ns)
        changes = Changes(mode if wanted & Set.MODE else None, size if wanted & Set.SIZE else None, *times)
        if not wanted & Set.HANDLE:
            return self._render_status(self._folder.change(self._find(request), changes))
        return self._render_status(self._folder.change(self._find(request), changes, handle))

    def _tell_statistics(self, _request: FuseRequest) -> bytes:
        return self._wire.render_statistics(self._folder.find_space())

    # Files.

    def _open(self, request: FuseRequest) -> bytes:
        handle, is_known = self._folder.open(self._find(request), request.numbers[0])
        return self._wire.render_opened(handle, KEEP_CACHE if is_known else 0)

    def _create(self, request: FuseRequest) -> bytes:
        flags, mode, _, _ = request.numbers
        node, status, handle, is_known = self._folder.create(self._find(request), request.names[0], flags, mode)
        opened = self._wire.render_opened(handle, KEEP_CACHE if is_known else 0)
        return self._render_entry(node, status) + opened

    def _read(self, request: FuseRequest) -> bytes:
        handle, offset, size, *_ = request.numbers
        return self._folder.read(handle, size, offset)

    def _write(self, request: FuseRequest) -> bytes:
        handle, offset, size, *_ = request.numbers
        return self._wire.render_written(self._folder.write(handle, request.data[:size], offset))

    def _sync(self, request: FuseRequest) -> bytes:
        self._folder.sync(request.numbers[0])
        return b""

    def _release(self, request: FuseRequest) -> bytes:
        self._handles.close(request.numbers[0])
        return b""

    # Folders.

    def _open_folder(self, request: FuseRequest) -> bytes:
        return self._wire.render_opened(self._folder.open_folder(self._find(request)))

    def _list(self, request: FuseRequest) -> bytes:
        """As many names as have room, from an offset on: the number of names before."""
        handle, offset, size, *_ = request.numbers
        has_entries = request.opcode == Op.READDIRPLUS
        room = min(size, DATA_MAX)
        answer = bytearray()
        with self._folder.list(handle, offset) as (listing, fd):
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
