"""Listens for connections: on a vsock port, a UNIX socket, or a socket that systemd passed.

Owns opening, accepting and the check of each peer. Knows nothing of sessions.
"""

import _socket
import os

from vshd.carry import vsock
from vshd.carry.sockets import ListeningSocket, listen_at
from vshd.flags import PORT_MAX, FlagError

# Upstream's is 32; a flood of clients should wait in the kernel (which allows 4096), not be refused.
BACKLOG = 1024
# A UNIX socket holds 208 KiB by default, less than one full frame: with more, a frame leaves in one piece.
SEND_BUFFER_SIZE = 1 << 20
# systemd's sd_listen_fds(3): passed descriptors start here.
LISTEN_FDS_START = 3


class Listener:
    """A listening socket, with the check of each peer."""

    __slots__ = ("_allowed_cids", "_bound", "socket")

    def __init__(self, bound: ListeningSocket, allowed_cids: frozenset[int] | None) -> None:
        """allowed_cids: the CIDs that vshd serves; None: all."""
        bound.socket.setblocking(False)
        self.socket = bound.socket
        self._bound = bound
        self._allowed_cids = allowed_cids

    @property
    def is_vsock(self) -> bool:
        return self.socket.family == _socket.AF_VSOCK

    def accept(self) -> tuple[int, str, bool]:
        """Returns the next connection: its descriptor, its peer's name, and whether vshd may serve it.

        Raises BlockingIOError when none waits.
        """
        fd, address = self._bound.accept()
        if isinstance(address, tuple) and self.is_vsock:
            cid, port = address
            is_allowed = self._allowed_cids is None or cid in self._allowed_cids
            return fd, f"vsock {cid}:{port}", is_allowed
        connection = _socket.socket(fileno=fd)
        connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, SEND_BUFFER_SIZE)
        connection.detach()
        # File permissions decide which users reach a UNIX socket.
        return fd, "unix", True

    def close(self) -> None:
        """Ends listening, and removes the path if it is still this socket's."""
        self._bound.close()


def parse_allowed_cids(words: list[str]) -> frozenset[int] | None:
    """Returns the CIDs of --allow_cid and the host's; None for `any`. Raises FlagError."""
    cids = {vsock.HOST_CID}
    for word in words:
        if word == "any":
            return None
        if not (word.isascii() and word.isdigit() and int(word) <= PORT_MAX):
            raise FlagError(f"vshd: ERROR: illegal value '{word}' specified for cid flag 'allow_cid'", 65)
        cids.add(int(word))
    return frozenset(cids)


def bind_early(where: str) -> "_socket.socket | None":
    """Binds the port of `vsock:PORT` for a later listen; None for a UNIX socket. Raises the errors of open_listener.

    While the socket is open, no other program can bind the port.
    """
    kind, _, rest = where.partition(":")
    if kind == "unix" and rest:
        return None
    if kind == "vsock" and rest.isascii() and rest.isdigit() and int(rest) < PORT_MAX:
        return vsock.bind_listener(int(rest))
    raise FlagError(f"vshd: ERROR: illegal value '{where}' specified for address flag 'listen'", 65)


def open_listener(where: str, allowed_cids: frozenset[int] | None, bound: "_socket.socket | None" = None) -> Listener:
    """Listens at `vsock:PORT` or `unix:PATH`. bound: bind_early's socket. Raises FlagError, VsockError, OSError."""
    bound = bound or bind_early(where)
    if bound is None:
        return Listener(_open_unix(where.partition(":")[2]), allowed_cids)
    vsock.listen(bound, BACKLOG)
    return Listener(ListeningSocket(bound), allowed_cids)


def open_beside(fd: int, allowed_cids: frozenset[int] | None) -> tuple[Listener, bytes]:
    """Listens where the client at the other end of `fd` can connect, too; and that place, as the protocol writes it.

    Raises OSError, VsockError.
    """
    client = _socket.socket(fileno=fd)
    is_vsock = client.family == _socket.AF_VSOCK
    client.detach()
    if is_vsock:
        listening = vsock.bind_listener(vsock.ANY)
        place = b"vsock:%d" % listening.getsockname()[1]
    else:
        listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        # An abstract name, which the kernel chooses: no file is left over.
        listening.bind("")
        place = b"unix:@" + listening.getsockname()[1:]
    listening.listen(BACKLOG)
    return Listener(ListeningSocket(listening), allowed_cids), place


def take_passed_listener(allowed_cids: frozenset[int] | None) -> Listener | None:
    """Returns the socket that systemd passed, None without one (sd_listen_fds(3)). Raises FlagError for several."""
    pid = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) < 1:
        return None
    if int(count) > 1:
        raise FlagError(f"vshd: systemd passed {count} sockets, and vshd serves one", 1)
    return Listener(ListeningSocket(_socket.socket(fileno=LISTEN_FDS_START)), allowed_cids)


def connect_to(where: str) -> int:
    """Connects to `vsock:CID:PORT` or `unix:PATH`; returns a descriptor. Raises FlagError, VsockError, OSError."""
    kind, _, rest = where.partition(":")
    cid, _, port = rest.partition(":")
    if kind == "vsock" and cid.isascii() and cid.isdigit() and port.isascii() and port.isdigit():
        if int(port) >= PORT_MAX:
            raise vsock.VsockError(f"Port {port} is not a valid port")
        try:
            return vsock.connect(int(cid), int(port)).detach()
        except vsock.VsockError as error:
            raise vsock.VsockError(f"Failed to connect to vsh client: {error}") from error
    if kind == "unix" and rest:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.connect(rest)
        except OSError as error:
            connection.close()
            raise OSError(error.errno, f"Failed to connect to vsh client: {error.strerror}") from error
        return connection.detach()
    raise FlagError(f"vshd: ERROR: illegal value '{where}' specified for address flag 'forward_to'", 65)


def _open_unix(path: str) -> ListeningSocket:
    """Opens a socket that only its owner can connect to. Raises OSError."""
    try:
        return listen_at(path, BACKLOG)
    except OSError as error:
        raise OSError(error.errno, f"Failed to listen at {path}: {error.strerror or error}") from error
