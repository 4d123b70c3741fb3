"""Listening sockets: how a path is bound, and the two cases in which a path is removed.

A path is removed before a bind only if it is a dead socket, and at the end only if it is still the socket that this
process bound. Everything else stays: other files, and sockets that a program has open, listening or not.

How a dead socket is recognised: connect() of a datagram socket finds the socket behind a path and then refuses it for
its type (EPROTOTYPE). It never waits for a full backlog, it takes no place in one, and the listener sees nothing of it.
ECONNREFUSED means that no program has the socket open (unix(7); unix_find_bsd() in the kernel's net/unix/af_unix.c).

Knows nothing of who connects. Owns the use of `_socket`'s private accept(), which gives a bare descriptor.
"""

import _socket
import errno
import os
import stat
import time

# A lock is held for microseconds. In a folder that many may write to another user can hold it for ever.
LOCK_DEADLINE_S = 2.0
LOCK_POLL_S = 0.005

_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}


class ListeningSocket:
    """A listening socket and its path, empty for one without.

    Invariant: while `socket` is open the kernel gives its inode's number to no other file, so device and number tell
    for certain whether the path still leads here.
    """

    __slots__ = ("_identity", "path", "socket")

    def __init__(self, listening: "_socket.socket", path: str = "") -> None:
        """path: where the socket has just been bound."""
        self.socket = listening
        self.path = path
        self._identity = _identify(os.lstat(path)) if path else None

    def accept(self) -> tuple[int, object]:
        """The next connection's descriptor and its address. Raises BlockingIOError, OSError."""
        fd, address = self.socket._accept()  # type: ignore[attr-defined]  # typeshed lacks it
        return int(fd), address

    def is_there(self) -> bool:
        """False once the path is gone, or leads to something else."""
        return self._identity is None or _find_identity(self.path) == self._identity

    def close(self) -> None:
        """Closes the socket. Removes its path first, if it is still this socket's."""
        if self._identity is not None:
            try:
                if self.is_there():
                    os.unlink(self.path)
            except OSError:
                pass
        self.socket.close()


def listen_at(path: str, backlog: int) -> ListeningSocket:
    """Listens at `path`, for this user alone. A dead socket is replaced, everything else stays. Raises OSError."""
    remove_dead(path)
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # Of the socket, bind() makes the mode of the path: unlike with umask(), other threads' files are not touched.
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(path)
        bound = ListeningSocket(listening, path)
    except OSError:
        listening.close()
        raise
    try:
        listening.listen(backlog)
    except OSError:
        bound.close()
        raise
    return bound


def remove_dead(path: str) -> None:
    """Removes a socket that no program has open. Raises OSError, with a text, for whatever else is at `path`."""
    if _find_identity(path) is None:
        return
    # Two of ours must not do this at once: the slower one would remove the socket that the faster one has bound.
    lock = _lock_folder(os.path.dirname(path) or ".")
    try:
        _remove_dead(path)
    except FileNotFoundError:
        pass
    finally:
        if lock >= 0:
            os.close(lock)


def _remove_dead(path: str) -> None:
    # Open until the end: the kernel gives its number to no other file meanwhile.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFSOCK:
            raise FileExistsError(errno.EEXIST, f"the path is {_KINDS.get(kind, 'a file')}, not a socket", path)
        _check_dead(path)
        if _find_identity(path) == _identify(found):
            os.unlink(path)
    finally:
        os.close(fd)


def _lock_folder(folder: str) -> int:
    """A descriptor that holds the lock of a folder; -1 when it could not be locked, and chance has to do."""
    import fcntl  # noqa: PLC0415 - a vshd in a guest listens at no path

    deadline_s = time.monotonic() + LOCK_DEADLINE_S
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline_s:
                time.sleep(LOCK_POLL_S)
                continue
        except OSError:
            # A file system without locks.
            pass
        return fd


def _check_dead(path: str) -> None:
    """Raises OSError when a program has the socket open, or that cannot be found out."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    finally:
        probe.close()
    if code in (0, errno.EPROTOTYPE):
        raise OSError(errno.EADDRINUSE, "the socket is in use by another program", path)
    if code not in (errno.ECONNREFUSED, errno.ENOENT):
        raise OSError(code, f"cannot tell whether the socket is in use: {os.strerror(code)}", path)


def _find_identity(path: str) -> tuple[int, int] | None:
    try:
        return _identify(os.lstat(path))
    except OSError:
        return None


def _identify(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
