"""Carries out the requests of SFTP on the file system, as the user that this process is.

Every request gets one answer, into `output`. Knows nothing of the connection. What fails is a status: its code is the
one that OpenSSH's server gives for the same errno, and its text is the system's own.
"""

import errno
import os
import stat

from vshd.services.sftp import packets
from vshd.services.sftp.attributes import LongNames, render_stat
from vshd.services.sftp.extensions import ANNOUNCED, EXTENSIONS
from vshd.services.sftp.handles import File, Folder, Handles, StatusError
from vshd.services.sftp.packets import Attributes, Fields, PacketError, take_head
from vshd.services.sftp.xattrs import set_xattrs
from vshd.wire.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# A NAME answer ends behind the entry that passes this: every client must take packets of 34000 bytes (draft, 3).
NAMES_SIZE = 30_000
MODE_BITS = 0o7777
NEW_FILE, NEW_FOLDER = 0o666, 0o777
OFFSET_MAX = (1 << 63) - 1
# link(2) on a file system, or for a user, that has no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EACCES)

_CODES = dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP), packets.NO_SUCH_FILE)
_CODES |= dict.fromkeys((errno.EPERM, errno.EACCES, errno.EFAULT), packets.PERMISSION_DENIED)
_CODES |= dict.fromkeys((errno.ENAMETOOLONG, errno.EINVAL), packets.BAD_MESSAGE)
_CODES |= dict.fromkeys((errno.ENOSYS, errno.EOPNOTSUPP), packets.OP_UNSUPPORTED)


class Requests:
    """Invariant: after an INIT, each request has one answer in `output`, in the order in which they came."""

    def __init__(self, output: Output, home: bytes, is_wanted: "Callable[[], bool]") -> None:
        """home: the user's. is_wanted: whether the client still waits, for requests that take long."""
        self.output = output
        self.home = home
        self.is_wanted = is_wanted
        self.handles = Handles()
        # For the log.
        self.count = self.bytes_out = self.bytes_in = 0
        # Answers a READ another way; False: it did not.
        self.read_file: Callable[[int, File, int, int], bool] | None = None
        self._long_names = LongNames()
        self._is_open = False
        self._handlers: dict[int, Callable[[int, Fields], None]] = {
            packets.OPEN: self._open,
            packets.CLOSE: self._close,
            packets.READ: self._read,
            packets.WRITE: self._write,
            packets.LSTAT: self._lstat,
            packets.FSTAT: self._fstat,
            packets.SETSTAT: self._setstat,
            packets.FSETSTAT: self._fsetstat,
            packets.OPENDIR: self._opendir,
            packets.READDIR: self._readdir,
            packets.REMOVE: self._remove,
            packets.MKDIR: self._mkdir,
            packets.RMDIR: self._rmdir,
            packets.REALPATH: self._realpath,
            packets.STAT: self._stat,
            packets.RENAME: self._rename,
            packets.READLINK: self._readlink,
            packets.SYMLINK: self._symlink,
            packets.EXTENDED: self._extended,
        }

    def take(self, packet: memoryview) -> None:
        """Carries out one packet. Raises PacketError for one that can have no answer: the connection must end."""
        kind, ident = take_head(packet)
        self.count += 1
        if kind == packets.INIT:
            self._is_open = True
            self.output.append(packets.render_version(ANNOUNCED))
            return
        if not self._is_open:
            raise PacketError("a request before INIT")
        handler = self._handlers.get(kind)
        if handler is None:
            self.status(ident, packets.OP_UNSUPPORTED, b"no request has the type %d" % kind)
            return
        try:
            handler(ident, Fields(packet, 5))
        except OSError as error:
            text = os.strerror(error.errno) if error.errno else str(error)
            self.status(ident, _CODES.get(error.errno or 0, packets.FAILURE), text.encode())
        except StatusError as error:
            self.status(ident, error.code, error.text)
        except (PacketError, ValueError, OverflowError) as error:
            self.status(ident, packets.BAD_MESSAGE, str(error).encode())
        except (MemoryError, NotImplementedError, RecursionError) as error:
            code = packets.OP_UNSUPPORTED if isinstance(error, NotImplementedError) else packets.FAILURE
            self.status(ident, code, type(error).__name__.encode())

    def close(self) -> None:
        """Closes what the client left open."""
        self.handles.close_all()

    def status(self, ident: int, code: int = packets.OK, text: bytes = b"") -> None:
        """Answers with a status."""
        self.output.append(packets.render_status(ident, code, text))

    # Files.

    def _open(self, ident: int, fields: Fields) -> None:
        path, wanted, attributes = fields.string(), fields.int32(), fields.attributes()
        self.handles.check_room()
        mode = NEW_FILE if attributes.mode is None else attributes.mode & MODE_BITS
        # Not to wait: a FIFO without a peer would hold this process up for ever.
        fd = os.open(path, _find_flags(wanted) | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
        number = self.handles.add_file(File(fd, is_regular=is_regular))
        self.output.append(packets.render_handle(ident, number))

    def _close(self, ident: int, fields: Fields) -> None:
        self.handles.close(fields.handle())
        self.status(ident)

    def _read(self, ident: int, fields: Fields) -> None:
        number, offset, size = fields.transfer()
        file = self.handles.file(number)
        size = min(size, packets.DATA_MAX)
        if self.read_file is not None and self.read_file(ident, file, offset, size):
            return
        data = os.pread(file.fd, size, offset)
        if not data and size:
            self.status(ident, packets.EOF, b"end of file")
            return
        self.output.append(packets.render_data_head(ident, len(data)))
        self.output.append(data)
        self.bytes_out += len(data)

    def _write(self, ident: int, fields: Fields) -> None:
        number, offset, size = fields.transfer()
        data = fields.rest(size)
        file = self.handles.file(number)
        written = os.pwrite(file.fd, data, offset)
        while written < size:
            more = os.pwrite(file.fd, data[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "nothing was written")
            written += more
        self.bytes_in += size
        self.status(ident)

    # Attributes.

    def _stat(self, ident: int, fields: Fields) -> None:
        self._tell(ident, os.stat(fields.string()))

    def _lstat(self, ident: int, fields: Fields) -> None:
        self._tell(ident, os.lstat(fields.string()))

    def _fstat(self, ident: int, fields: Fields) -> None:
        self._tell(ident, os.fstat(self.handles.file(fields.handle()).fd))

    def _tell(self, ident: int, found: os.stat_result) -> None:
        self.output.append(packets.render_attributes_answer(ident, render_stat(found)))

    def _setstat(self, ident: int, fields: Fields) -> None:
        set_attributes(fields.string(), fields.attributes())
        self.status(ident)

    def _fsetstat(self, ident: int, fields: Fields) -> None:
        file = self.handles.file(fields.handle())
        set_attributes(file.fd, fields.attributes())
        self.status(ident)

    # Folders.

    def _opendir(self, ident: int, fields: Fields) -> None:
        path = fields.string()
        self.handles.check_room()
        number = self.handles.add_folder(Folder(path))
        self._long_names.start()
        self.output.append(packets.render_handle(ident, number))

    def _readdir(self, ident: int, fields: Fields) -> None:
        folder = self.handles.folder(fields.handle())
        size = 0
        names: list[bytes] = []
        if folder.take_dots():
            names += [self._describe(name, os.lstat(os.path.join(folder.path, name))) for name in (b".", b"..")]
        for entry in folder.entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError:
                described = packets.render_entry(entry.name, entry.name, packets.NO_ATTRIBUTES)
            else:
                described = self._describe(entry.name, found)
            names.append(described)
            size += len(described)
            if size > NAMES_SIZE:
                break
        if not names:
            self.status(ident, packets.EOF, b"end of the folder")
            return
        self.output.append(packets.render_names(ident, len(names), b"".join(names)))

    def _describe(self, name: bytes, found: os.stat_result) -> bytes:
        return packets.render_entry(name, self._long_names.render(name, found), render_stat(found))

    def _mkdir(self, ident: int, fields: Fields) -> None:
        path, mode = fields.string(), fields.attributes().mode
        os.mkdir(path, NEW_FOLDER if mode is None else mode & MODE_BITS)
        self.status(ident)

    def _rmdir(self, ident: int, fields: Fields) -> None:
        os.rmdir(fields.string())
        self.status(ident)

    # Names.

    def _remove(self, ident: int, fields: Fields) -> None:
        os.unlink(fields.string())
        self.status(ident)

    def _rename(self, ident: int, fields: Fields) -> None:
        rename_without_loss(fields.string(), fields.string())
        self.status(ident)

    def _readlink(self, ident: int, fields: Fields) -> None:
        self.answer_name(ident, os.readlink(fields.string()))

    def _symlink(self, ident: int, fields: Fields) -> None:
        """OpenSSH's order, which all clients follow: first what the link leads to, then the link."""
        target, link = fields.string(), fields.string()
        os.symlink(target, link)
        self.status(ident)

    def _realpath(self, ident: int, fields: Fields) -> None:
        self.answer_name(ident, resolve(fields.string()))

    def answer_name(self, ident: int, name: bytes) -> None:
        """Answers with one name, without attributes."""
        self.output.append(packets.render_names(ident, 1, packets.render_entry(name, name, packets.NO_ATTRIBUTES)))

    def _extended(self, ident: int, fields: Fields) -> None:
        name = fields.string()
        handler = EXTENSIONS.get(name)
        if handler is None:
            self.status(ident, packets.OP_UNSUPPORTED, b"no extension has this name")
            return
        handler(self, ident, fields)


def _find_flags(wanted: int) -> int:
    flags = os.O_RDONLY
    if wanted & packets.FOR_WRITING:
        flags = os.O_RDWR if wanted & packets.FOR_READING else os.O_WRONLY
    if wanted & packets.APPENDING:
        flags |= os.O_APPEND
    if wanted & packets.CREATING:
        flags |= os.O_CREAT
    if wanted & packets.TRUNCATING:
        flags |= os.O_TRUNC
    if wanted & packets.EXCLUSIVE:
        flags |= os.O_EXCL
    return flags


def set_attributes(place: bytes | int, attributes: Attributes, *, follow_symlinks: bool = True) -> None:
    """Sets what is given. The owner comes first: a new one takes setuid and file capabilities away. The mode comes
    behind the extended attributes: it may not let its owner write them. Raises OSError, StatusError.
    """
    if attributes.size is not None:
        os.truncate(place, attributes.size)
    if attributes.owner is not None:
        uid, gid = attributes.owner
        if isinstance(place, int):
            os.chown(place, uid, gid)
        else:
            os.chown(place, uid, gid, follow_symlinks=follow_symlinks)
    if attributes.xattrs:
        set_xattrs(place, attributes.xattrs, follow_symlinks=follow_symlinks)
    if attributes.mode is not None:
        if isinstance(place, int):
            os.chmod(place, attributes.mode & MODE_BITS)
        else:
            os.chmod(place, attributes.mode & MODE_BITS, follow_symlinks=follow_symlinks)
    if attributes.times is not None:
        if isinstance(place, int):
            os.utime(place, attributes.times)
        else:
            os.utime(place, attributes.times, follow_symlinks=follow_symlinks)


def rename_without_loss(old: bytes, new: bytes) -> None:
    """RENAME: a file that has the new name stays (draft, 6.5). Raises OSError."""
    if stat.S_ISREG(os.lstat(old).st_mode):
        try:
            # One step, which cannot take the place of a file that another program makes meanwhile.
            os.link(old, new, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            os.unlink(old)
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, "the new name is taken")
    os.rename(old, new)


def resolve(path: bytes) -> bytes:
    """The absolute path without links, as realpath(3); its last part need not exist. Raises OSError."""
    if not path:
        path = b"."
    try:
        return os.path.realpath(path, strict=True)
    except FileNotFoundError:
        resolved = os.path.realpath(path)
        os.stat(os.path.dirname(resolved))
        return resolved
