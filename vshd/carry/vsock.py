"""The one module of vshd that opens AF_VSOCK; it refuses where VSH_AF_VSOCK=deny is set.

The C module `_socket` is used directly: `socket` would add two dozen modules and 1.5 MiB to a daemon that needs five
calls of it.
"""

import _socket
import os
import sys

LOCAL_CID, HOST_CID = 1, 2
EPERM = 1
ANY = 0xFFFFFFFF
# A port below this can only be bound by root: that is how the host knows who sent READY.
PRIVILEGED_PORTS = 1024
# The host side has bound its port before the guest starts: an answer comes at once or never.
CONNECT_TIMEOUT_S = 5.0
# <linux/vm_sockets.h>: how long the kernel waits for an answer to connect(). Without it that is 2 s, whatever the
# program's own limit: too little for a machine under emulation that is busy, or was just restored.
SO_VM_SOCKETS_CONNECT_TIMEOUT = 6
CONNECT_TIMEOUT_S_MAX = 1e9
# A long of C, in bytes.
LONG_SIZE = 8 if sys.maxsize >> 32 else 4


class VsockError(Exception):
    """AF_VSOCK cannot be used: what was tried, and why not."""


def bind_listener(port: int) -> "_socket.socket":
    """A socket bound to `port`, for every CID of this guest; it does not listen yet."""
    listener = open_socket()
    try:
        listener.bind((ANY, port))
    except OSError as error:
        listener.close()
        raise VsockError(f"Failed to bind vshd port {port}: {error.strerror}") from error
    return listener


def listen(listener: "_socket.socket", backlog: int) -> None:
    """Lets a bound socket listen."""
    try:
        listener.listen(backlog)
    except OSError as error:
        raise VsockError(f"Failed to listen: {error.strerror}") from error


def is_loopback_refused() -> bool:
    """True when the kernel forbids to connect to this guest itself, not merely knows no way there."""
    connection = open_socket()
    try:
        connection.setblocking(False)
        connection.connect((LOCAL_CID, 1))
    except OSError as error:
        return error.errno == EPERM
    finally:
        connection.close()
    return False


def connect(cid: int, port: int, *, from_privileged: bool = False) -> "_socket.socket":
    """A connection to `port` of `cid`, from a port below 1024 if wanted."""
    connection = open_socket()
    try:
        if from_privileged:
            _bind_privileged(connection)
        limit_connect(connection.fileno(), CONNECT_TIMEOUT_S)
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect((cid, port))
    except OSError as error:
        connection.close()
        raise VsockError(f"Failed to connect to vsock {cid}:{port}: {error.strerror or error}") from error
    return connection


def limit_connect(fd: int, timeout_s: float) -> None:
    """Lets the kernel wait so long for an answer to connect(). fd: of an AF_VSOCK socket. Raises OSError."""
    limit_us = int(min(max(0.001, timeout_s), CONNECT_TIMEOUT_S_MAX) * 1e6)
    timeval = b"".join(part.to_bytes(LONG_SIZE, sys.byteorder) for part in divmod(limit_us, 1_000_000))
    # Python takes nothing but 64 bits for an option of a socket that it knows for AF_VSOCK.
    alias = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    try:
        alias.setsockopt(_socket.AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, timeval)
    finally:
        alias.detach()


def _bind_privileged(connection: "_socket.socket") -> None:
    for port in range(PRIVILEGED_PORTS - 1, 0, -1):
        try:
            connection.bind((ANY, port))
        except OSError as error:
            if error.errno != 98:  # EADDRINUSE of asm-generic/errno.h: try the next
                raise
        else:
            return
    raise OSError(98, "every privileged port is in use")


def open_socket() -> "_socket.socket":
    """A socket of the family. Raises VsockError."""
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        raise VsockError("AF_VSOCK is denied by VSH_AF_VSOCK=deny")
    try:
        return _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    except OSError as error:
        raise VsockError(f"Failed to open vsock socket: {error.strerror}") from error
