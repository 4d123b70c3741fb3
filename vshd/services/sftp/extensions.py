"""Extensions of SFTP, OpenSSH's (its PROTOCOL file, section 4) and vmkit's: each is a function of a row."""

import errno
import os

from vshd.services.sftp import packets
from vshd.services.sftp.handles import HANDLES_MAX, StatusError
from vshd.services.sftp.whole import read_file, read_folder, write_file
from vshd.services.sftp.xattrs import read_xattrs
from vshd.session import users

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vshd.services.sftp.packets import Fields
    from vshd.services.sftp.requests import Requests

# copy-data copies this much between two looks at whether the client still waits.
COPY_SIZE = 1 << 26
COPY_BUFFER_SIZE = 1 << 18
# statvfs@openssh.com
FLAG_READ_ONLY, FLAG_NO_SETUID = 1, 2
# copy_file_range(2) between files that it cannot serve.
_NO_RANGES = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


def posix_rename(requests: "Requests", ident: int, fields: "Fields") -> None:
    old, new = fields.string(), fields.string()
    os.rename(old, new)
    requests.status(ident)


def hard_link(requests: "Requests", ident: int, fields: "Fields") -> None:
    old, new = fields.string(), fields.string()
    os.link(old, new, follow_symlinks=False)
    requests.status(ident)


def sync(requests: "Requests", ident: int, fields: "Fields") -> None:
    os.fsync(requests.handles.file(fields.handle()).fd)
    requests.status(ident)


def statvfs(requests: "Requests", ident: int, fields: "Fields") -> None:
    _tell_space(requests, ident, os.statvfs(fields.string()))


def fstatvfs(requests: "Requests", ident: int, fields: "Fields") -> None:
    _tell_space(requests, ident, os.fstatvfs(requests.handles.file(fields.handle()).fd))


def _tell_space(requests: "Requests", ident: int, found: os.statvfs_result) -> None:
    flags = FLAG_READ_ONLY * bool(found.f_flag & os.ST_RDONLY) | FLAG_NO_SETUID * bool(found.f_flag & os.ST_NOSUID)
    numbers = (
        *(found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail),
        *(found.f_files, found.f_ffree, found.f_favail, found.f_fsid & ((1 << 64) - 1), flags, found.f_namemax),
    )
    requests.output.append(packets.render_extended_reply(ident, numbers))


def limits(requests: "Requests", ident: int, _fields: "Fields") -> None:
    numbers = (packets.PACKET_MAX, packets.DATA_MAX, packets.DATA_MAX, HANDLES_MAX)
    requests.output.append(packets.render_extended_reply(ident, numbers))


def set_link_attributes(requests: "Requests", ident: int, fields: "Fields") -> None:
    from vshd.services.sftp.requests import set_attributes  # noqa: PLC0415 - that module has the table of this one

    path, attributes = fields.string(), fields.attributes()
    if attributes.size is not None:
        raise StatusError(packets.BAD_MESSAGE, b"a link has no size to set")
    set_attributes(path, attributes, follow_symlinks=False)
    requests.status(ident)


def expand_path(requests: "Requests", ident: int, fields: "Fields") -> None:
    """~ and ~USER, and then as REALPATH."""
    from vshd.services.sftp.requests import resolve  # noqa: PLC0415 - see above

    path = fields.string()
    if path.startswith(b"~"):
        user, slash, rest = path[1:].partition(b"/")
        path = (_find_home(user) if user else requests.home) + slash + rest
    requests.answer_name(ident, resolve(path))


def _find_home(user: bytes) -> bytes:
    found = users.find_user(user)
    if found is None:
        raise StatusError(packets.NO_SUCH_FILE, b"no user has this name")
    return found.home


def copy_data(requests: "Requests", ident: int, fields: "Fields") -> None:
    """From one open file to another. Of endless files there is no end to copy: only regular ones are taken."""
    source, offset, size = requests.handles.file(fields.handle()), fields.int64(), fields.int64()
    sink, at = requests.handles.file(fields.handle()), fields.int64()
    if not source.is_regular or os.path.sameopenfile(source.fd, sink.fd):
        raise StatusError(packets.FAILURE, b"copy-data needs two files, and the first must be a regular one")
    left = size or max(0, os.fstat(source.fd).st_size - offset)
    while left:
        if not requests.is_wanted():
            raise StatusError(packets.FAILURE, b"the client has left")
        copied = _copy_some(source.fd, sink.fd, min(left, COPY_SIZE), offset, at)
        if not copied:
            break
        left, offset, at = left - copied, offset + copied, at + copied
    if left and size:
        raise StatusError(packets.FAILURE, b"the file ends before the data does")
    requests.status(ident)


def _copy_some(source: int, sink: int, size: int, offset: int, at: int) -> int:
    try:
        return os.copy_file_range(source, sink, size, offset, at)
    except OSError as error:
        if error.errno not in _NO_RANGES:
            raise
    return os.pwrite(sink, os.pread(source, min(size, COPY_BUFFER_SIZE), offset), at)


EXTENSIONS: "dict[bytes, Callable[[Requests, int, Fields], None]]" = {
    b"posix-rename@openssh.com": posix_rename,
    b"statvfs@openssh.com": statvfs,
    b"fstatvfs@openssh.com": fstatvfs,
    b"hardlink@openssh.com": hard_link,
    b"fsync@openssh.com": sync,
    b"lsetstat@openssh.com": set_link_attributes,
    b"limits@openssh.com": limits,
    b"expand-path@openssh.com": expand_path,
    b"copy-data": copy_data,
    b"read-file@vmkit": read_file,
    b"write-file@vmkit": write_file,
    b"read-folder@vmkit": read_folder,
    b"xattrs@vmkit": read_xattrs,
}
_VERSIONS = {b"statvfs@openssh.com": b"2", b"fstatvfs@openssh.com": b"2"}
ANNOUNCED = tuple((name, _VERSIONS.get(name, b"1")) for name in EXTENSIONS)
