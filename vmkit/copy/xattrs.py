"""Extended attributes of files: which ones a copy takes, and what makes those of two files equal."""

import contextlib
import errno
import os

from vmkit.copy.items import FileError, refuse
from vmkit.copy.wire import XATTRS_BYTES_MAX, XATTRS_MAX, Xattrs
from vsh.text import clean_line

# An untrusted guest gives this host what programs keep there, and nothing that the kernel gives a meaning.
USER = b"user."
# Into a guest go file capabilities, too, as packages have them.
CAPABILITY = b"security.capability"
_NONE_KEPT = (errno.EOPNOTSUPP, errno.ENOSYS)


def choose_for_host(xattrs: Xattrs) -> Xattrs:
    """Returns those that this host takes."""
    return tuple(one for one in xattrs if one[0].startswith(USER))


def choose_for_guest(xattrs: Xattrs) -> Xattrs:
    """Returns those that a guest takes."""
    return tuple(one for one in xattrs if one[0].startswith(USER) or one[0] == CAPABILITY)


def find_changes(wanted: Xattrs, found: Xattrs) -> Xattrs:
    """Returns what gives a file with the attributes `found` those of `wanted`. A value of None removes one."""
    there = dict(found)
    changed = tuple((name, value) for name, value in wanted if there.get(name) != value)
    return changed + tuple((name, None) for name in there.keys() - dict(wanted).keys())


def read_host_xattrs(fd: int) -> Xattrs:
    """Returns those of an open file that a copy may take. Raises FileError."""
    try:
        names = [os.fsencode(name) for name in os.listxattr(fd)]
    except OSError as error:
        if error.errno in _NONE_KEPT:
            return ()
        raise refuse(error) from error
    found: list[tuple[bytes, bytes | None]] = []
    for name in names:
        # One that is gone meanwhile, or is not this user's, is left out.
        with contextlib.suppress(OSError):
            found.append((name, os.getxattr(fd, name)))
    return check_xattrs(choose_for_guest(tuple(found)))


def check_xattrs(xattrs: Xattrs) -> Xattrs:
    """Returns them. Raises FileError where they do not fit into a packet."""
    if len(xattrs) > XATTRS_MAX or sum(len(name) + len(value or b"") for name, value in xattrs) > XATTRS_BYTES_MAX:
        raise FileError("it has too many extended attributes")
    return xattrs


def set_host_xattrs(file: int | str, xattrs: Xattrs) -> None:
    """Sets those of a file that this host takes: an open one, or by its path in /proc/self/fd. Raises FileError."""
    for name, value in choose_for_host(xattrs):
        try:
            if value is None:
                os.removexattr(file, name)
            else:
                os.setxattr(file, name, value)
        except OSError as error:
            if value is None and error.errno == errno.ENODATA:
                continue
            reason = "it is too large" if error.errno == errno.ENOSPC else os.strerror(error.errno or 0)
            raise FileError(f"cannot set the attribute {clean_line(name)}: {reason}") from error
