"""Extended attributes of files: vmkit's extension to read them, and what sets them (docs/reference/protocol.md 6.4)."""

import errno
import os

from vshd.services.sftp import packets
from vshd.services.sftp.handles import StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.services.sftp.packets import Fields
    from vshd.services.sftp.requests import Requests

# Of one file, names and values together: they fit into a packet. ext4 keeps one block of them, most files have none.
XATTRS_SIZE_MAX = 1 << 17
# A file system that keeps none.
_NONE_KEPT = (errno.EOPNOTSUPP, errno.ENOSYS)


def read_xattrs(requests: "Requests", ident: int, fields: "Fields") -> None:
    """All extended attributes of a file that the user may read. Follows links."""
    path = fields.string()
    pairs: list[tuple[bytes, bytes]] = []
    size = 0
    try:
        names = os.listxattr(path)
    except OSError as error:
        if error.errno not in _NONE_KEPT:
            raise
        names = []
    for name in names:
        try:
            value = os.getxattr(path, name)
        except OSError:
            # It is gone meanwhile, or is not this user's.
            continue
        pairs.append((os.fsencode(name), value))
        size += len(pairs[-1][0]) + len(value)
        if len(pairs) > packets.EXTENDED_ATTRIBUTES_MAX or size > XATTRS_SIZE_MAX:
            raise StatusError(packets.FAILURE, b"it has too many extended attributes")
    requests.output.append(packets.render_extended_attributes(ident, packets.render_xattrs(pairs)))


def set_xattrs(place: bytes | int, xattrs: "tuple[tuple[bytes, bytes | None], ...]", *, follow_symlinks: bool) -> None:
    """Sets each, and removes those without a value. Raises StatusError, which names the one that failed."""
    # An open file is no path, and has no link to follow.
    follow = follow_symlinks or isinstance(place, int)
    for name, value in xattrs:
        try:
            if value is None:
                os.removexattr(place, name, follow_symlinks=follow)
            else:
                os.setxattr(place, name, value, follow_symlinks=follow)
        except OSError as error:
            if value is None and error.errno == errno.ENODATA:
                continue
            # ENOSPC is about this file: ext4 has one block for each.
            reason = "it is too large" if error.errno == errno.ENOSPC else os.strerror(error.errno or 0)
            text = b"cannot set the attribute %s: %s" % (name, reason.encode())
            raise StatusError(packets.FAILURE, text) from error
