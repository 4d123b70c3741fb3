"""What SFTP tells of a file: its attributes, and the line that `ls -l` of a client prints."""

import stat
import time

from vshd.services.sftp.packets import render_attributes
from vshd.session import users

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import Final, TypeVar

    Key = TypeVar("Key")

# A folder may hold files of many users and times: the tables start anew at this size.
CACHE_MAX = 1024
# ls(1) prints the year of what is older than half a year, or in the future.
RECENT_S = 182 * 86400
MINUTE_S = 60

# Positions in a stat result: by their names times are fractions, which can be rounded up. Positions are faster, too.
_MODE: "Final" = 0
_LINKS: "Final" = 3
_UID: "Final" = 4
_GID: "Final" = 5
_SIZE: "Final" = 6
_ATIME: "Final" = 7
_MTIME: "Final" = 8


def render_stat(found: "os.stat_result") -> bytes:
    """An ATTRS structure."""
    atime, mtime = int(found[_ATIME]), int(found[_MTIME])
    return render_attributes(found[_SIZE], found[_UID], found[_GID], found[_MODE], atime, mtime)


class LongNames:
    """Makes the lines of a listing. Invariant: no table has more than CACHE_MAX entries."""

    __slots__ = ("_beginnings", "_groups", "_minutes", "_now_s", "_users")

    def __init__(self) -> None:
        self._users: dict[int, bytes] = {}
        self._groups: dict[int, bytes] = {}
        self._minutes: dict[int, bytes] = {}
        # Most files of a folder begin their lines alike.
        self._beginnings: dict[tuple[int, int, int, int], bytes] = {}
        self._now_s = 0

    def start(self) -> None:
        """A listing begins: times are recent, or not, as of now."""
        self._now_s = int(time.time())
        self._minutes.clear()

    def render(self, name: bytes, found: "os.stat_result") -> bytes:
        """The line of one file."""
        beginning = self._beginnings.get(key := (found[_MODE], found[_LINKS], found[_UID], found[_GID]))
        if beginning is None:
            beginning = _look_up(self._beginnings, key, self._render_beginning)
        minute = self._minutes.get(when := int(found[_MTIME]) // MINUTE_S)
        if minute is None:
            minute = _look_up(self._minutes, when, self._render_time)
        return b"%s %8d %s %s" % (beginning, found[_SIZE], minute, name)

    def _render_beginning(self, key: tuple[int, int, int, int]) -> bytes:
        mode, links, uid, gid = key
        user = _look_up(self._users, uid, _find_user)
        group = _look_up(self._groups, gid, _find_group)
        return b"%s %3d %-8s %-8s" % (stat.filemode(mode).encode(), links, user, group)

    def _render_time(self, minute: int) -> bytes:
        seconds = minute * MINUTE_S
        form = "%b %e %H:%M" if 0 <= self._now_s - seconds <= RECENT_S else "%b %e  %Y"
        try:
            return time.strftime(form, time.localtime(seconds)).encode()
        except (OverflowError, OSError, ValueError):
            # A year that the C library cannot name.
            return b"?"


def _look_up(table: "dict[Key, bytes]", key: "Key", find: "Callable[[Key], bytes]") -> bytes:
    value = table.get(key)
    if value is None:
        if len(table) >= CACHE_MAX:
            table.clear()
        value = table[key] = find(key)
    return value


def _find_user(uid: int) -> bytes:
    try:
        found = users.find_uid(uid)
    except OSError:
        found = None
    return b"%d" % uid if found is None else found.name


def _find_group(gid: int) -> bytes:
    try:
        found = users.find_gid(gid)
    except OSError:
        found = None
    return b"%d" % gid if found is None else found.name
