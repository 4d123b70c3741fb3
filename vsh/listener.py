"""Host sockets that a guest connects to: a vsock port of this host, on whichever transport the guest has.

Owns binding, the check of who connects, and the removal of paths. Used where the direction is reversed: containers,
and forwards from the guest.
"""

import _socket
import os
import select
import tempfile

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import ConnectionLost, VshError
from vsh.transport import listen_vsock, remaining_ms

# Host ports that nothing of ours uses, for hybrid vsock, where no kernel picks one.
FIRST_FREE_PORT = 49152


class HostListener:
    """Where a guest will connect. `port` is a vsock port; `place` what the guest's vshd calls it."""

    def __init__(self, listening: "_socket.socket", port: int, place: str, *, path: str = "", cid: int = 0) -> None:
        """cid: the only one whose connections are taken, where the transport tells it."""
        self.socket = listening
        self.port = port
        self.place = place
        self._path = path
        self._inode = os.stat(path).st_ino if path else 0
        self._cid = cid

    def accept(self) -> int:
        """The next connection. Raises VshError when it is another guest's, BlockingIOError, OSError."""
        fd, peer = self.socket._accept()  # type: ignore[attr-defined]
        if self.socket.family == _socket.AF_VSOCK and peer[0] != self._cid:
            os.close(fd)
            raise VshError(f"Received connection from VM {peer[0]} but expected {self._cid}")
        return int(fd)

    def receive(self, fd: int, size: int, deadline_s: float) -> bytes:
        """Exactly `size` bytes of a connection. Raises VshError."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        data = b""
        while len(data) < size:
            if not poll.poll(remaining_ms(deadline_s)):
                raise VshError(f"a connection to {self.place} says nothing")
            try:
                more = os.read(fd, size - len(data))
            except OSError:
                more = b""
            if not more:
                raise ConnectionLost(f"a connection to {self.place} ended before it began")
            data += more
        return data

    def is_there(self) -> bool:
        """False when the path it is bound to was removed, or is another's by now."""
        if not self._path:
            return True
        try:
            return os.stat(self._path).st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        is_there = self.is_there()
        self.socket.close()
        if self._path and is_there:
            try:
                os.unlink(self._path)
            except OSError:
                pass


def listen_for_guest(vm: Address, port: int | None, *, backlog: int = 1) -> HostListener:
    """Listens for connections of `vm`, on a free port by default. Raises VshError."""
    if vm.kind == kinds.VSOCK:
        listening, found = listen_vsock(backlog, port)
        return HostListener(listening, found, f"vsock:2:{found}", cid=vm.cid)
    if vm.kind == kinds.HYBRID:
        # A guest's connection to host port N of a hybrid vsock arrives at PATH_N.
        return _listen_hybrid(vm.path, port, backlog)
    if vm.kind == kinds.UNIX:
        path = tempfile.mktemp(prefix="vsh-host-")  # noqa: S306 - bind() fails if somebody else was first
        return _bind(path, 0, backlog)
    raise VshError(
        f"{vm.name} is one connection: what comes back needs --cid, --vm_name, --uds or --unix",
        status=kinds.USAGE_STATUS,
    )


def _listen_hybrid(path: str, wanted: int | None, backlog: int) -> HostListener:
    ports = [wanted] if wanted is not None else range(FIRST_FREE_PORT, FIRST_FREE_PORT + 1000)
    for port in ports:
        try:
            return _bind(f"{path}_{port}", port, backlog)
        except OSError:
            _remove_dead(f"{path}_{port}")
        try:
            return _bind(f"{path}_{port}", port, backlog)
        except OSError:
            continue
    if wanted is not None:
        raise VshError(f"vsock port {wanted} of this host is in use for this machine", details=f"{path}_{wanted}")
    raise VshError("Failed to bind vsh port", details=f"{path}_PORT: every port is taken")


def _remove_dead(path: str) -> None:
    """A socket whose program was killed is in nobody's way."""
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        try:
            os.unlink(path)
        except OSError:
            pass
    except OSError:
        pass
    finally:
        probe.close()


def _bind(path: str, port: int, backlog: int) -> HostListener:
    listening = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
        listening.listen(backlog)
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(mask)
    place = f"vsock:2:{port}" if port else f"unix:{path}"
    return HostListener(listening, port, place, path=path)
