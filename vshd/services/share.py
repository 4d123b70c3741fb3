"""A folder of the host in this guest (docs/reference/protocol.md 5.6): a file system whose requests the host answers.

Owns the mount and the folders made for it. How the requests reach the host is a way, a row of WAYS. When either side
ends, so does the mount: programs that use it then get an error.
"""

import _socket
import errno
import os

from vshd.root import find_call
from vshd.session.refusal import RefusalError
from vshd.signals import find_ignored
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Share

    class ShareWay(Protocol):
        """How the requests of one mount reach the host. description: what the client is answered.

        Its module has prepare(), which returns one, or raises refuse_way() where this guest's kernel lacks it.
        """

        description: bytes

        def mount(self, share: Share) -> None:
            """Mounts at the folder, which is there. Raises OSError."""

        def serve(self, fd: int, rest: bytes, wakeup: Wakeup) -> str:
            """Serves until the guest unmounts, the host leaves, or vshd ends; the end in words. Raises OSError."""

        def close(self) -> None:
            """Ends each request that waits with an error."""


# By the names of Share.by. To add a way: a row here, and its module in `later` of the service's row.
FUSE = b"fuse"
WAYS = {
    FUSE: "vshd.services.share_fuse",
    b"virtiofs": "vshd.services.share_virtiofs",
    b"9p": "vshd.services.share_9p",
}
# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
PATH_MAX = 4096
# What a file system over a connection answers after its end.
ENDED = frozenset((errno.EIO, errno.ECONNRESET, errno.EREMOTEIO))
ATTEMPTS = 3
# The end of a share that the guest has taken away itself.
UNMOUNTED = "unmounted"


def user_of(_share: "Share") -> bytes:
    """Root, who alone can mount."""
    return b"root"


def describe(share: "Share") -> str:
    """What the log calls it."""
    return os.fsdecode(b"share " + share.path[:PATH_MAX])


def open_service(share: "Share", _fd: int, _around: "Surroundings") -> "Mounted":
    """Mounts the file system. Raises RefusalError, and then nothing has changed."""
    path = os.fsdecode(share.path)
    words = path.split("/")
    if (
        not any(words)
        or len(share.path) >= PATH_MAX
        or words[0]
        or ".." in words
        or "\0" in path
        or b"\0" in share.source
    ):
        raise RefusalError("a share needs an absolute path, without ..", messages.BAD_REQUEST)
    way = prepare_way(share.by or FUSE)
    step = f"make the folder {path}"
    made: list[str] = []
    try:
        _detach_dead(path)
        for attempts_left in range(ATTEMPTS - 1, -1, -1):
            try:
                made += [folder for folder in make_folders(path) if folder not in made]
                if os.stat(path).st_dev != os.stat(os.path.dirname(path.rstrip("/"))).st_dev:
                    raise RefusalError(f"{path} is a mount point already", messages.BUSY)
                step = f"mount at {path}"
                way.mount(share)
                break
            except FileNotFoundError:
                # The relay of an earlier share has removed the folder a moment ago.
                if not attempts_left:
                    raise
    except OSError as error:
        way.close()
        _remove_folders(made)
        raise RefusalError(f"cannot {step}: {error.strerror}", messages.OTHER, error=error.errno or 0) from error
    except RefusalError:
        way.close()
        _remove_folders(made)
        raise
    return Mounted(way, share.path, made)


def prepare_way(name: bytes) -> "ShareWay":
    """Raises RefusalError, whose kind is UNSUPPORTED where this guest does not have it: the host may try another."""
    module = WAYS.get(name)
    if module is None:
        shown = os.fsdecode(name[:PATH_MAX])
        raise RefusalError(f"this vshd cannot share by {shown}", messages.UNSUPPORTED)
    way: ShareWay = __import__(module, fromlist=("prepare",)).prepare()
    return way


def refuse_way(reason: str, error: OSError) -> RefusalError:
    """What prepare() raises: the guest's kernel lacks this way."""
    return RefusalError(reason, messages.UNSUPPORTED, error=error.errno or 0)


def load_module(*names: str) -> None:
    """Loads modules of the kernel, as far as this guest has them."""
    try:
        pid = os.posix_spawnp("modprobe", ["modprobe", "-a", *names], os.environ, setsigdef=find_ignored())
    except OSError:
        return
    os.waitpid(pid, 0)


def _detach_dead(path: str) -> None:
    """Takes away what a vshd that was killed has left: a mount that answers nothing but errors."""
    try:
        # The host must answer this one. The kernel answers a stat from what it remembers of earlier answers.
        os.statvfs(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN or (error.errno in ENDED and _is_connection(os.fsencode(path))):
            _detach(os.fsencode(path))


def _is_connection(path: bytes) -> bool:
    """Whether the mount at a path is 9P's over a descriptor. A disk that is broken has the same errors."""
    found = False
    try:
        with open("/proc/self/mountinfo", "rb") as file:
            for line in file:
                words, _, kind = line.partition(b" - ")
                # Spaces are escaped there.
                if words.split()[4:5] == [path.replace(b" ", b"\\040")]:
                    found = kind.startswith(b"9p ") and b"trans=fd" in kind
    except OSError:
        return False
    return found


def _detach(path: bytes) -> None:
    try:
        find_call("umount2")(path, MNT_DETACH | UMOUNT_NOFOLLOW)
    except OSError:
        # It was taken away meanwhile.
        pass


def make_folders(path: str) -> "list[str]":
    """Makes a folder and those above it; returns the ones that were missing, the uppermost first. Raises OSError."""
    made: list[str] = []
    end = 0
    while end < len(path):
        end = path.find("/", end + 1)
        end = len(path) if end < 0 else end
        try:
            os.mkdir(path[:end], 0o755)
        except FileExistsError:
            continue
        except OSError:
            _remove_folders(made)
            raise
        made.append(path[:end])
    return made


def _hang_up(fd: int) -> None:
    """Ends the connection and closes its descriptor. A mount that others hold may have the connection still."""
    try:
        connection = _socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return
    try:
        connection.shutdown(_socket.SHUT_RDWR)
    except OSError:
        # The host was faster.
        pass
    connection.close()


def _remove_folders(made: "list[str]") -> None:
    """Removes the folders that were made, as far as they are empty."""
    for folder in reversed(made):
        try:
            os.rmdir(folder)
        except OSError:
            return


class Mounted:
    """A share that its guest has."""

    def __init__(self, way: "ShareWay", path: bytes, made: "list[str]") -> None:
        self.description = way.description
        self._way = way
        self._path = path
        self._made = made

    def run(self, fd: int, rest: bytes, wakeup: "Wakeup", _log: "Log") -> str:
        """Serves until the guest unmounts, the host leaves, or vshd ends."""
        end = "broken"
        try:
            end = self._way.serve(fd, rest, wakeup)
        except OSError as error:
            end = f"broken: {error.strerror}"
        finally:
            # The kernel answers all that waits with an error, before anything else is done.
            self._way.close()
            if end != UNMOUNTED:
                _detach(self._path)
            _remove_folders(self._made)
            _hang_up(fd)
        return end
