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


def read_file(requests: "Requests", ident: int, fields: "Fields") -> None:
    """A regular file's attributes and all of its data. The client compares the size with the length."""
    # A FIFO must not hold this process up.
    fd = os.open(fields.string(), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        data = os.read(fd, WHOLE_MAX + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        found = os.fstat(fd)
    finally:
        os.close(fd)
    if len(data) > WHOLE_MAX or not stat.S_ISREG(found.st_mode):
        raise StatusError(packets.FAILURE, b"this is no regular file of at most %d bytes" % WHOLE_MAX)
    requests.output.append(packets.render_whole(ident, render_stat(found), data))
    requests.bytes_out += len(data)


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
