"""Host sockets that a guest connects to: a vsock port of this host, on the transport that the guest has.

Owns the choice of the port and the check of each peer. Containers and forwards from the guest use it, because there
the guest connects to the host.
"""

import _socket
import errno
import os
import tempfile

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import VshError
from vsh.transport import listen_vsock
from vshd.carry.sockets import ListeningSocket, listen_at

# Host ports that no other part of ours uses. Six digits, since the port ends the path of a hybrid vsock's socket.
FIRST_FREE_PORT, FREE_PORTS = 100_000, 900_000
PORT_TRIES = 64
# What is at a port's path stays there, and the next port may be free.
IN_THE_WAY = (errno.EADDRINUSE, errno.EEXIST, errno.EACCES, errno.EPERM)


class HostListener:
    """A socket to which a guest will connect. `port` is a vsock port; `place` is its address for the guest's vshd."""

    def __init__(self, bound: ListeningSocket, port: int, place: str, *, cid: int = 0) -> None:
        """cid: only its connections are accepted, where the transport carries a CID."""
        self.socket = bound.socket
        self.port = port
        self.place = place
        self._bound = bound
        self._cid = cid

    def accept(self) -> int:
        """Returns the next connection. Raises VshError when it is another guest's, BlockingIOError, OSError."""
        fd, peer = self._bound.accept()
        if isinstance(peer, tuple) and self.socket.family == _socket.AF_VSOCK and peer[0] != self._cid:
            os.close(fd)
            raise VshError(f"Received connection from VM {peer[0]} but expected {self._cid}")
        return fd

    def is_there(self) -> bool:
        """False when the socket's path was removed, or now leads elsewhere."""
        return self._bound.is_there()

    def close(self) -> None:
        """Ends listening, and removes the path if it is still this socket's."""
        self._bound.close()


def listen_for_guest(vm: Address, port: int | None, *, backlog: int = 1) -> HostListener:
    """Listens for connections of `vm`, on a free port by default. Raises VshError."""
    if vm.kind == kinds.VSOCK:
        return _listen_kernel(vm.cid, port, backlog)
    if vm.kind == kinds.HYBRID:
        # A guest's connection to host port N of a hybrid vsock arrives at PATH_N.
        return _listen_hybrid(vm.path, port, backlog)
    if vm.kind == kinds.UNIX:
        path = tempfile.mktemp(prefix="vsh-host-")  # noqa: S306 - bind() fails if another program was first
        return HostListener(listen_at(path, backlog), 0, f"unix:{path}")
    raise VshError(
        f"{vm.name} is a single connection, and the guest needs a second one: use --cid, --vm_name, --uds or --unix",
        status=kinds.USAGE_STATUS,
    )


def _listen_hybrid(path: str, wanted: int | None, backlog: int) -> HostListener:
    if wanted is not None:
        try:
            return _listen_at_port(path, wanted, backlog)
        except OSError as error:
            raise VshError(
                f"cannot listen on vsock port {wanted} of this host for this machine: {error.strerror or error}",
                details=f"{path}_{wanted}",
                hint="choose another port",
            ) from error
    for _ in range(PORT_TRIES):
        port = choose_port()
        try:
            return _listen_at_port(path, port, backlog)
        except OSError as error:
            if error.errno not in IN_THE_WAY:
                raise VshError(f"Failed to bind vsh port: {error.strerror}", details=f"{path}_{port}") from error
    raise VshError("Failed to bind vsh port", details=f"{path}_PORT: other programs use every port")


def _listen_kernel(cid: int, wanted: int | None, backlog: int) -> HostListener:
    for _ in range(PORT_TRIES):
        try:
            listening, port = listen_vsock(backlog, choose_port() if wanted is None else wanted)
        except VshError as error:
            cause = error.__cause__
            if wanted is None and isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
                continue
            raise
        return HostListener(ListeningSocket(listening), port, f"vsock:2:{port}", cid=cid)
    raise VshError("Failed to bind vsh port", details="other programs use every port that vsh tried")


def choose_port() -> int:
    """Returns a port that a program of the guest cannot guess. A caller must prove itself all the same."""
    return FIRST_FREE_PORT + int.from_bytes(os.urandom(8), "little") % FREE_PORTS


def _listen_at_port(path: str, port: int, backlog: int) -> HostListener:
    return HostListener(listen_at(f"{path}_{port}", backlog), port, f"vsock:2:{port}")
