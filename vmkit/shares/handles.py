"""What a guest has open: files, each a descriptor, and lists of folders, which have none.

Their number has a ceiling below this process's own, so that a guest that opens everything leaves room to serve it.
"""

import errno
import os
import resource
from dataclasses import dataclass, field

from vmkit.shares.nodes import KnownFile

# For the connection, the folder, and the walk of one request.
RESERVED_FDS = 32
FILES_MAX = LISTINGS_MAX = 16_384
# Names of all listed folders together, some 150 bytes each.
NAMES_MAX = 1 << 20


@dataclass(slots=True)
class OpenFile:
    """An open file."""

    node: KnownFile
    fd: int


@dataclass(slots=True)
class OpenFolder:
    """A folder's names, with inode numbers and types, as they were when the guest began to read them."""

    node: KnownFile
    names: list[tuple[bytes, int, int]] = field(default_factory=list)
    is_read: bool = False


class OpenFiles:
    """Invariant: `_open` has every descriptor that was added and not closed. The names are counted in `_names`."""

    def __init__(self) -> None:
        self._open: dict[int, OpenFile | OpenFolder] = {}
        self._last = 0
        self._files = 0
        self._names = 0
        self._files_max = raise_limit() - RESERVED_FDS

    def check_room(self) -> None:
        """Raises OSError where one more file is too many."""
        if self._files >= self._files_max:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def check_listings(self) -> None:
        """Raises OSError where one more listing is too many."""
        if len(self._open) - self._files >= LISTINGS_MAX:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def add(self, handle: OpenFile | OpenFolder) -> int:
        """The number by which the guest calls it."""
        self._last += 1
        self._open[self._last] = handle
        if isinstance(handle, OpenFile):
            self._files += 1
            handle.node.files.append(handle.fd)
        return self._last

    def find_file(self, number: int) -> OpenFile:
        """Raises OSError."""
        handle = self._open.get(number)
        if not isinstance(handle, OpenFile):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def find_listing(self, number: int) -> OpenFolder:
        """Raises OSError."""
        handle = self._open.get(number)
        if not isinstance(handle, OpenFolder):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return handle

    def list_names(self, listing: OpenFolder, names: list[tuple[bytes, int, int]]) -> None:
        """Gives a listing its names. Raises OSError where all listings have too many together."""
        self._names += len(names) - len(listing.names)
        listing.names, listing.is_read = names, True
        if self._names > NAMES_MAX:
            self._names -= len(names)
            listing.names = []
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def close(self, number: int) -> None:
        """Closes what has this number, if anything has."""
        handle = self._open.pop(number, None)
        if isinstance(handle, OpenFile):
            self._files -= 1
            handle.node.files.remove(handle.fd)
            os.close(handle.fd)
        elif handle is not None:
            self._names -= len(handle.names)

    def close_all(self) -> None:
        for number in list(self._open):
            self.close(number)


def raise_limit() -> int:
    """Lets this process open as many files as it may, and returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard == resource.RLIM_INFINITY else min(FILES_MAX, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return min(soft, FILES_MAX)
