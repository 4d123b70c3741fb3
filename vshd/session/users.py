"""Reads the files /etc/passwd and /etc/group of the root that this process is in: passwd(5) and group(5).

The C library is not asked. In a root that is not vshd's own, it would load that root's libraries into this process, as
root. So users of other sources (LDAP, systemd-homed) are not found. Owns the meaning of the lines. A line that breaks
the form counts as none, and the first of two entries counts.
"""

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWD = "/etc/passwd"  # noqa: S105 - a path
GROUP = "/etc/group"
# A hundred thousand users have a file of 6 MiB.
FILE_MAX = 16 << 20
# linux/limits.h: NGROUPS_MAX. setgroups(2) takes no more.
GROUPS_MAX = 65536
# (uid_t)-1 means no user to setresuid(2).
ID_MAX = (1 << 32) - 2
_ID_DIGITS_MAX = len(str(ID_MAX))
# Lines of NIS stand for users of another source; others are comments.
_OTHER_LINES = (b"+", b"-", b"#")
_READ_SIZE = 1 << 16


class UserEntry:
    """One line of the users' file."""

    __slots__ = ("gid", "home", "name", "shell", "uid")

    def __init__(self, name: bytes, uid: int, gid: int, home: bytes, shell: bytes) -> None:
        self.name = name
        self.uid = uid
        self.gid = gid
        self.home = home
        self.shell = shell


class GroupEntry:
    """One line of the groups' file. members: of whom it is not the first group."""

    __slots__ = ("gid", "members", "name")

    def __init__(self, name: bytes, gid: int, members: list[bytes]) -> None:
        self.name = name
        self.gid = gid
        self.members = members


def find_user(name: bytes) -> UserEntry | None:
    """The user of this name; None: the file has none, or there is no such file. Raises OSError."""
    return find_user_in(read_file(PASSWD), name)


def find_uid(uid: int) -> UserEntry | None:
    """The first user with this number; None as find_user(). Raises OSError."""
    return find_uid_in(read_file(PASSWD), uid)


def find_group(name: bytes) -> GroupEntry | None:
    """The group of this name; None as find_user(). Raises OSError."""
    for line in _find_lines(read_file(GROUP), _start_of(name)):
        group = parse_group(line)
        if group is not None and group.name == name:
            return group
    return None


def find_gid(gid: int) -> GroupEntry | None:
    """The first group with this number; None as find_user(). Raises OSError."""
    for line in _find_lines(read_file(GROUP), b":%d:" % gid):
        group = parse_group(line)
        if group is not None and group.gid == gid:
            return group
    return None


def list_groups(name: bytes, gid: int) -> list[int]:
    """The groups of a user whose first group is gid: that one, and all that list the name. Raises OSError."""
    return list_groups_in(read_file(GROUP), name, gid)


# The files' bytes.


def find_user_in(data: bytes, name: bytes) -> UserEntry | None:
    """find_user() for a file that was read."""
    for line in _find_lines(data, _start_of(name)):
        user = parse_user(line)
        if user is not None and user.name == name:
            return user
    return None


def find_uid_in(data: bytes, uid: int) -> UserEntry | None:
    """find_uid() for a file that was read."""
    for line in _find_lines(data, b":%d:" % uid):
        user = parse_user(line)
        if user is not None and user.uid == uid:
            return user
    return None


def list_groups_in(data: bytes, name: bytes, gid: int) -> list[int]:
    """list_groups() for a file that was read."""
    # In the order of the file, each once.
    found = {gid: None}
    for line in _find_lines(data, name if is_name(name) else b""):
        group = parse_group(line)
        if group is not None and name in group.members:
            found[group.gid] = None
            if len(found) == GROUPS_MAX:
                break
    return list(found)


def parse_user(line: bytes) -> UserEntry | None:
    """A line of passwd(5); None: it is none. Home and shell may be missing."""
    fields = line.split(b":")
    if len(fields) < 4 or not is_name(fields[0]) or b"\0" in line:
        return None
    uid, gid = parse_id(fields[2]), parse_id(fields[3])
    if uid is None or gid is None:
        return None
    home, shell = (*fields[5:7], b"", b"")[:2]
    return UserEntry(fields[0], uid, gid, home, shell)


def parse_group(line: bytes) -> GroupEntry | None:
    """A line of group(5); None: it is none. The members may be missing."""
    fields = line.split(b":")
    if len(fields) < 3 or not is_name(fields[0]) or b"\0" in line:
        return None
    gid = parse_id(fields[2])
    if gid is None:
        return None
    return GroupEntry(fields[0], gid, fields[3].split(b",") if len(fields) > 3 and fields[3] else [])


def parse_id(text: bytes) -> int | None:
    """A user's or group's number, written as the kernel writes it; None: it is none."""
    if not text.isdigit() or len(text) > _ID_DIGITS_MAX or (text[0] == 0x30 and len(text) > 1):
        return None
    number = int(text)
    return number if number <= ID_MAX else None


def read_file(path: str) -> bytes:
    """The whole file; nothing where no regular file has this name. Raises OSError, also when the file is too large."""
    try:
        # A FIFO would wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return b""
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return b""
        data = b""
        while len(data) <= FILE_MAX and (piece := os.read(fd, _READ_SIZE)):
            data += piece
    finally:
        os.close(fd)
    if len(data) > FILE_MAX:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return data


def _find_lines(data: bytes, part: bytes) -> "Iterator[bytes]":
    """Every line that holds `part`, in order; none for an empty one. Python looks at no other line."""
    at = data.find(part) if part else -1
    while at >= 0:
        start = data.rfind(b"\n", 0, at) + 1
        end = data.find(b"\n", at)
        yield data[start : end if end >= 0 else len(data)]
        at = data.find(part, end) if end >= 0 else -1


def _start_of(name: bytes) -> bytes:
    """What a line of this name has in it; empty for what cannot be one."""
    return name + b":" if is_name(name) else b""


def is_name(name: bytes) -> bool:
    """Whether a line can have this name."""
    return bool(name) and not name.startswith(_OTHER_LINES) and not any(byte in name for byte in b":\n\0")
