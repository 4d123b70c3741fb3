"""Small files in one request each: two extensions of vmkit's for trees of them (docs/reference/protocol.md 6.3).

With OPEN, READ and CLOSE a small file costs three requests, and five where it is written under a temporary name.
"""

import os
import stat

from vshd.services.sftp import packets
from vshd.services.sftp.attributes import render_stat
from vshd.services.sftp.handles import StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.services.sftp.packets import Fields
    from vshd.services.sftp.requests import Requests

# A larger file gains nothing, and the answer to READ can be spliced.
WHOLE_MAX = 32 << 10
FLAG_SYNC = 1
# An answer to read-folder ends behind the entry that passes this: with it, it is at most three quarters of a packet.
FOLDER_SIZE = 1 << 17
# Not to wait, and no terminal: as for every file that is opened here. In a folder no link is followed.
_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_READING_NO_LINK = _READING | os.O_NOFOLLOW
# An entry without its name and data: two lengths, attributes, and whether there is data.
ENTRY_SIZE = 44


def read_file(requests: "Requests", ident: int, fields: "Fields") -> None:
    """A regular file's attributes and all of its data. The client compares the size with the length."""
    # A FIFO must not hold this process up.
    fd = os.open(fields.string(), _READING)
    try:
        data = os.read(fd, WHOLE_MAX + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if len(data) > WHOLE_MAX or not stat.S_ISREG(found.st_mode):
        raise StatusError(packets.FAILURE, b"this is no regular file of at most %d bytes" % WHOLE_MAX)
    requests.output.append(packets.render_whole(ident, render_stat(found), data))
    requests.bytes_out += len(data)


def read_folder(requests: "Requests", ident: int, fields: "Fields") -> None:
    """The next names of an open folder, as READDIR gives them but without lines for people, and with the data of small
    files.
    """
    folder = requests.handles.folder(fields.handle())
    parts: list[bytes] = []
    count = size = size_of_data = 0
    for entry in folder.entries:
        data = None
        try:
            if entry.is_file(follow_symlinks=False):
                found, data = _read_small(entry.path)
            else:
                found = entry.stat(follow_symlinks=False)
            attributes = render_stat(found)
        except FileNotFoundError:
            continue
        except OSError:
            # The client asks for it by OPEN, and gets this error.
            attributes = _look(entry)
        name = entry.name
        if data is None:
            parts += (packets.render_string(name), attributes, packets.NO_DATA)
        else:
            # One string each, and not one for the entry: most entries are such files.
            parts += (packets.render_string(name), attributes, packets.render_data_size(len(data)), data)
            size_of_data += len(data)
        size += len(name) + ENTRY_SIZE
        count += 1
        if size + size_of_data > FOLDER_SIZE:
            break
    if not count:
        requests.status(ident, packets.EOF, b"end of the folder")
        return
    requests.output.append(packets.render_contents(ident, count, b"".join(parts)))
    requests.bytes_out += size_of_data


def _read_small(path: bytes) -> "tuple[os.stat_result, bytes | None]":
    """A file's state, and its data if it is small. Raises OSError."""
    fd = os.open(path, _READING_NO_LINK)
    try:
        data = os.read(fd, WHOLE_MAX + 1)
        found = os.fstat(fd)
    finally:
        os.close(fd)
    is_whole = len(data) == found.st_size <= WHOLE_MAX and stat.S_ISREG(found.st_mode)
    return found, data if is_whole else None


def _look(entry: "os.DirEntry[bytes]") -> bytes:
    """The attributes of a file that could not be read."""
    try:
        return render_stat(entry.stat(follow_symlinks=False))
    except OSError:
        return packets.NO_ATTRIBUTES


def write_file(requests: "Requests", ident: int, fields: "Fields") -> None:
    """Makes a file under a temporary name, and renames it when it is whole. After an error nothing of it is left."""
    from vshd.services.sftp.requests import set_attributes  # noqa: PLC0415 - that module has the table of this one

    temporary, path = fields.string(), fields.string()
    flags, attributes, data = fields.int32(), fields.attributes(), fields.view()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    try:
        try:
            written = 0
            while written < len(data):
                written += os.write(fd, data[written:])
            set_attributes(fd, attributes)
            if flags & FLAG_SYNC:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        raise
    requests.bytes_in += written
    requests.status(ident)
