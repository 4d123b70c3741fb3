"""Answers a guest's 9P requests from one folder of this host (vmkit.shares.folder), and from nothing else.

A guest names a file by a fid, a number of its own choice. Every fid counts on the node of its file. The node counts on
the folders above, so the way to it is known for as long as the fid lives.
"""

import errno
import os
import stat
import time
from collections.abc import Callable

from vmkit.ninep.messages import (
    MSIZE_MAX,
    MSIZE_MIN,
    NAMES_MAX,
    NO_FID,
    READ_HEAD_SIZE,
    UNKNOWN_VERSION,
    VERSION,
    NineKind,
    NineMessages,
    NineRequest,
    pack,
    pack_attributes,
    pack_name,
    pack_qid,
    pack_statistics,
    pack_text,
    parse,
    render,
    render_error,
)
from vmkit.shares.cutter import MountFailedError, ProtocolError
from vmkit.shares.files import SECOND_NS, Changes, find_key, is_writing, make_error, read_time
from vmkit.shares.folder import SharedFolder
from vmkit.shares.nodes import KnownFile, RootedFiles

# About 200 bytes each. The nodes that they name have a ceiling of their own.
FIDS_MAX = 1 << 18
# linux/fcntl.h
REMOVE_FOLDER = 0x200
# linux/net/9p/9p.h: P9_SETATTR_*
SET_MODE, SET_SIZE, SET_ATIME, SET_MTIME, ATIME_GIVEN, MTIME_GIVEN = 0x01, 0x08, 0x10, 0x20, 0x80, 0x100
LOCK_SUCCESS, LOCK_NONE = 0, 2


class Fid:
    """What a guest has a number for. handle: of its open file or listing, in SharedFolder.handles."""

    __slots__ = ("flags", "handle", "is_folder", "node")

    def __init__(self, node: KnownFile) -> None:
        self.node = node
        self.handle: int | None = None
        self.is_folder = False
        self.flags = 0


class NineSpeaker:
    """One guest's 9P. Invariant: every fid is in `_fids`, and counts once on its node; its handle ends with it."""

    def __init__(self, folder: int, *, is_read_only: bool) -> None:
        """folder: an open directory, which stays the caller's."""
        self.messages = NineMessages()
        self.is_mounted = False
        self._nodes = RootedFiles(find_key(os.fstat(folder)))
        self._folder = SharedFolder(folder, self._nodes, is_read_only=is_read_only)
        self._fids: dict[int, Fid] = {}
        # 0: the guest has not begun.
        self._msize = 0
        self._answers: dict[int, Callable[[NineRequest], bytes]] = {
            NineKind.STATFS: self._tell_statistics,
            NineKind.LOPEN: self._open,
            NineKind.LCREATE: self._create,
            NineKind.SYMLINK: self._make_link,
            NineKind.MKNOD: self._make_node,
            NineKind.RENAME: self._rename_file,
            NineKind.READLINK: self._read_link,
            NineKind.GETATTR: self._get_attributes,
            NineKind.SETATTR: self._set_attributes,
            NineKind.READDIR: self._list,
            NineKind.FSYNC: self._sync,
            NineKind.LOCK: self._lock,
            NineKind.GETLOCK: self._find_lock,
            NineKind.LINK: self._link,
            NineKind.MKDIR: self._make_folder,
            NineKind.RENAMEAT: self._rename,
            NineKind.UNLINKAT: self._unlink,
            NineKind.ATTACH: self._attach,
            # Each request is answered before the next is read: the old one has its answer already.
            NineKind.FLUSH: lambda _request: b"",
            NineKind.WALK: self._walk,
            NineKind.READ: self._read,
            NineKind.WRITE: self._write,
            NineKind.CLUNK: self._clunk,
            NineKind.REMOVE: self._remove,
        }

    def close(self) -> None:
        """Closes all that the guest has open."""
        self._folder.close()

    def answer(self, message: memoryview) -> bytes:
        """The answer to one message. Raises ProtocolError, MountFailedError."""
        request = parse(message)
        if request.kind == NineKind.VERSION:
            return render(request.kind, request.tag, self._begin(request))
        if request.kind == NineKind.LERROR + 1 and not self.is_mounted:
            raise MountFailedError(_read_reason(request))
        if not self._msize:
            raise ProtocolError("the first message is not Tversion")
        if len(message) > self._msize:
            raise ProtocolError(f"a message has {len(message)} bytes, and {self._msize} were agreed")
        handler = self._answers.get(request.kind)
        # Extended attributes, authentication, and what a later protocol may have.
        code = errno.EOPNOTSUPP
        if handler is not None:
            try:
                return render(request.kind, request.tag, handler(request))
            except OSError as error:
                code = error.errno or errno.EIO
            except (OverflowError, ValueError):
                # A number or a name that no system call takes.
                code = errno.EINVAL
        return render_error(request.tag, code)

    def _begin(self, request: NineRequest) -> bytes:
        """A guest that begins anew has nothing of before."""
        for number in list(self._fids):
            self._forget(number)
        self._msize = 0
        msize, version = min(request.numbers[0], MSIZE_MAX), request.texts[0]
        if msize < MSIZE_MIN:
            raise ProtocolError(f"the guest takes messages of {msize} bytes, and 9P needs {MSIZE_MIN}")
        if version != VERSION:
            return pack("I", msize) + pack_text(UNKNOWN_VERSION)
        self._msize = msize
        return pack("I", msize) + pack_text(VERSION)

    # Fids.

    def _find(self, number: int) -> Fid:
        """Raises OSError."""
        fid = self._fids.get(number)
        if fid is None:
            raise make_error(errno.EBADF)
        return fid

    def _find_node(self, number: int) -> KnownFile:
        """Raises OSError."""
        return self._find(number).node

    def _find_handle(self, number: int, *, is_folder: bool) -> int:
        """What is open. Raises OSError."""
        fid = self._find(number)
        if fid.handle is None:
            raise make_error(errno.EBADF)
        if fid.is_folder != is_folder:
            raise make_error(errno.EISDIR if fid.is_folder else errno.ENOTDIR)
        return fid.handle

    def _find_closed(self, number: int) -> Fid:
        """One that is not open yet. Raises OSError."""
        fid = self._find(number)
        if fid.handle is not None:
            raise make_error(errno.EINVAL)
        return fid

    def _check_new(self, number: int) -> None:
        """Raises OSError for a number that the guest has in use, and where one more is too many."""
        if number in self._fids or number == NO_FID:
            raise make_error(errno.EINVAL)
        if len(self._fids) >= FIDS_MAX:
            raise make_error(errno.ENFILE)

    def _forget(self, number: int) -> None:
        fid = self._fids.pop(number)
        if fid.handle is not None:
            self._folder.handles.close(fid.handle)
        self._nodes.forget(fid.node.number, 1)

    def _attach(self, request: NineRequest) -> bytes:
        """The folder itself. Which user asks, and for which tree, is all the same."""
        number, against, _ = request.numbers
        if against != NO_FID:
            raise make_error(errno.EINVAL)
        self._check_new(number)
        root = self._nodes.root
        status = self._folder.find_status(root)
        self._fids[number] = Fid(root)
        return pack_qid(status)

    def _walk(self, request: NineRequest) -> bytes:
        """As far as the names lead. The new fid comes about with the last of them."""
        number, new, count = request.numbers
        if count > NAMES_MAX:
            raise make_error(errno.EINVAL)
        fid = self._find_closed(number) if new == number else self._find(number)
        if new != number:
            self._check_new(new)
        node = fid.node
        self._nodes.keep(node)
        qids: list[bytes] = []
        for name in request.texts:
            try:
                inner, status = self._folder.look_up(node, name)
            except (OSError, ValueError):
                self._nodes.forget(node.number, 1)
                if not qids:
                    raise
                return pack("H", len(qids)) + b"".join(qids)
            self._nodes.forget(node.number, 1)
            node = inner
            qids.append(pack_qid(status))
        if new == number:
            self._nodes.forget(fid.node.number, 1)
            fid.node = node
        else:
            self._fids[new] = Fid(node)
        return pack("H", len(qids)) + b"".join(qids)

    def _clunk(self, request: NineRequest) -> bytes:
        self._find(request.numbers[0])
        self._forget(request.numbers[0])
        return b""

    def _remove(self, request: NineRequest) -> bytes:
        """The fid ends, whatever comes of the rest. Linux removes by Tunlinkat."""
        self._clunk(request)
        raise make_error(errno.EOPNOTSUPP)

    # Names.

    def _tell_qid(self, parent: KnownFile, name: bytes) -> bytes:
        node, status = self._folder.look_up(parent, name)
        self._nodes.forget(node.number, 1)
        return pack_qid(status)

    def _read_link(self, request: NineRequest) -> bytes:
        return pack_text(self._folder.read_link(self._find_node(request.numbers[0])))

    def _make_link(self, request: NineRequest) -> bytes:
        parent, (name, target) = self._find_node(request.numbers[0]), request.texts
        self._folder.make_link(parent, name, target)
        return self._tell_qid(parent, name)

    def _make_node(self, request: NineRequest) -> bytes:
        parent, name = self._find_node(request.numbers[0]), request.texts[0]
        self._folder.make_file(parent, name, request.numbers[1])
        return self._tell_qid(parent, name)

    def _make_folder(self, request: NineRequest) -> bytes:
        parent, name = self._find_node(request.numbers[0]), request.texts[0]
        self._folder.make_folder(parent, name, request.numbers[1])
        return self._tell_qid(parent, name)

    def _unlink(self, request: NineRequest) -> bytes:
        number, flags = request.numbers
        if flags & ~REMOVE_FOLDER:
            raise make_error(errno.EINVAL)
        remove = self._folder.remove_folder if flags else self._folder.unlink
        remove(self._find_node(number), request.texts[0])
        return b""

    def _rename(self, request: NineRequest) -> bytes:
        before, after = map(self._find_node, request.numbers)
        old, new = request.texts
        self._folder.rename(before, old, after, new)
        return b""

    def _rename_file(self, request: NineRequest) -> bytes:
        """By the file in place of its name."""
        node, after = map(self._find_node, request.numbers)
        if node is self._nodes.root:
            raise make_error(errno.EPERM)
        with self._folder.reach(node):
            self._folder.rename(self._nodes.find(node.parent), node.name, after, request.texts[0])
        return b""

    def _link(self, request: NineRequest) -> bytes:
        parent, node = map(self._find_node, request.numbers)
        self._folder.link(node, parent, request.texts[0])
        return b""

    # Attributes.

    def _get_attributes(self, request: NineRequest) -> bytes:
        status = self._folder.find_status(self._find_node(request.numbers[0]))
        return pack_attributes(status, self._folder.owner)

    def _set_attributes(self, request: NineRequest) -> bytes:
        number, valid, mode, _, _, size, *times = request.numbers
        fid, now_ns = self._find(number), time.time_ns()
        accessed_ns = modified_ns = None
        if valid & SET_ATIME:
            accessed_ns = _read_time(times[0], times[1]) if valid & ATIME_GIVEN else now_ns
        if valid & SET_MTIME:
            modified_ns = _read_time(times[2], times[3]) if valid & MTIME_GIVEN else now_ns
        mode_given, size_given = mode if valid & SET_MODE else None, size if valid & SET_SIZE else None
        is_written = fid.handle is not None and not fid.is_folder and fid.flags & os.O_ACCMODE != os.O_RDONLY
        changes = Changes(mode_given, size_given, accessed_ns, modified_ns)
        self._folder.change(fid.node, changes, fid.handle if is_written else None)
        return b""

    def _tell_statistics(self, request: NineRequest) -> bytes:
        self._find(request.numbers[0])
        # mount(2) itself asks for none: the folder has its place.
        self.is_mounted = True
        return pack_statistics(self._folder.find_space())

    # Files.

    def _open(self, request: NineRequest) -> bytes:
        number, flags = request.numbers
        fid = self._find_closed(number)
        status = self._folder.find_status(fid.node)
        fid.is_folder = stat.S_ISDIR(status.st_mode)
        if not fid.is_folder:
            fid.handle = self._folder.open(fid.node, flags)[0]
        elif is_writing(flags):
            raise make_error(errno.EISDIR)
        else:
            fid.handle = self._folder.open_folder(fid.node)
        fid.flags = flags
        return pack_qid(status) + pack("I", 0)

    def _create(self, request: NineRequest) -> bytes:
        """The fid of the folder becomes the file's."""
        number, flags, mode, _ = request.numbers
        fid = self._find_closed(number)
        node, status, fid.handle, _ = self._folder.create(fid.node, request.texts[0], flags, mode)
        self._nodes.forget(fid.node.number, 1)
        fid.node, fid.flags, fid.is_folder = node, flags, False
        return pack_qid(status) + pack("I", 0)

    def _read(self, request: NineRequest) -> bytes:
        number, offset, size = request.numbers
        handle = self._find_handle(number, is_folder=False)
        data = self._folder.read(handle, min(size, self._msize - READ_HEAD_SIZE), offset)
        return pack("I", len(data)) + data

    def _write(self, request: NineRequest) -> bytes:
        number, offset, size = request.numbers
        if size > len(request.data):
            raise ProtocolError(f"a request writes {size} bytes, and has {len(request.data)}")
        handle = self._find_handle(number, is_folder=False)
        return pack("I", self._folder.write(handle, request.data[:size], offset))

    def _sync(self, request: NineRequest) -> bytes:
        fid = self._find(request.numbers[0])
        if fid.handle is not None and not fid.is_folder:
            self._folder.sync(fid.handle)
        return b""

    def _lock(self, request: NineRequest) -> bytes:
        """The guest's kernel keeps locks among its own programs, and asks beside that."""
        self._find(request.numbers[0])
        return pack("B", LOCK_SUCCESS)

    def _find_lock(self, request: NineRequest) -> bytes:
        number, _, *place = request.numbers
        self._find(number)
        return pack("BQQI", LOCK_NONE, *place) + pack_text(request.texts[0])

    def _list(self, request: NineRequest) -> bytes:
        """As many names as have room, from an offset on: the number of names before."""
        number, offset, size = request.numbers
        room = min(size, self._msize - READ_HEAD_SIZE)
        answer = bytearray()
        with self._folder.list(self._find_handle(number, is_folder=True), offset) as (listing, _):
            for index in range(offset, len(listing.names)):
                name, inode, kind = listing.names[index]
                rendered = pack_name(inode, index + 1, name, kind)
                if len(answer) + len(rendered) > room:
                    if not answer:
                        raise make_error(errno.EINVAL)
                    break
                answer += rendered
        return pack("I", len(answer)) + answer


def _read_time(seconds: int, rest_ns: int) -> int:
    """Raises OSError."""
    if rest_ns >= SECOND_NS:
        raise make_error(errno.EINVAL)
    return read_time(seconds, rest_ns)


def _read_reason(request: NineRequest) -> str:
    """What the guest's vshd sends in place of a request: the errno of mount(2)."""
    code = int.from_bytes(request.data[:4], "little")
    return os.strerror(code) if 0 < code < 1 << 12 else "it gives no reason"
