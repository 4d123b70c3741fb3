"""Opens the connection to a vshd: UNIX sockets, hybrid vsock, and the one place of vsh that opens AF_VSOCK.

A transport is a descriptor, connected and non-blocking. The code above does not know its kind. This module uses the C
module `_socket` directly: `socket` would be a fifth of a short command's time, and `struct` a fiftieth.
"""

import _socket
import errno
import os
import select
import sys
import time

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import Busy, Unanswered, Unreachable, VshError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Ready = TypeVar("Ready")

# `OK 4294967295\n` has 14 bytes; more is no answer of a hybrid vsock.
OK_LINE_MAX = 32
# A UNIX socket holds 208 KiB by default, less than one full frame: with more, a frame leaves in one piece.
SEND_BUFFER_SIZE = 1 << 20
# The longest that Ctrl-C waits.
LOOK_MS = 500
# A long of C, in bytes.
LONG_SIZE = 8 if sys.maxsize >> 32 else 4


def open_transport(address: Address, deadline_s: float) -> int:
    """Returns a connected, non-blocking descriptor, which the caller closes. deadline_s: of time.monotonic().

    Raises VshError, which names the cause and the remedy.
    """
    if address.kind == kinds.DESCRIPTOR:
        return _take_descriptor(address)
    if address.kind == kinds.VSOCK:
        return _open_vsock(address, deadline_s)
    fd = _open_unix(address, deadline_s)
    if address.kind == kinds.HYBRID:
        try:
            ask_for_port(address, fd, deadline_s)
        except BaseException:
            os.close(fd)
            raise
    return fd


def remaining_ms(deadline_s: float) -> int:
    """Returns the milliseconds until a deadline, for poll()."""
    left_s = deadline_s - time.monotonic()
    return min(max(0, int(left_s * 1000) + 1), 1 << 30) if left_s > 0 else 0


def wait_until(wait: "Callable[[int], list[Ready]]", deadline_s: float) -> "list[Ready]":
    """Calls `wait`, such as poll(), with milliseconds until it returns something or the deadline has passed.

    A signal that arrives between Python's last look for one and poll() does not end that poll(). Ctrl-C would then have
    no effect until the deadline, so no single wait is long.
    """
    while True:
        left_ms = remaining_ms(deadline_s)
        found = wait(min(left_ms, LOOK_MS))
        if found or left_ms <= LOOK_MS:
            return found


def _take_descriptor(address: Address) -> int:
    try:
        os.set_blocking(address.fd, False)
    except OSError as error:
        raise VshError(f"{address.name} is not open", status=kinds.USAGE_STATUS) from error
    return address.fd


def _open_unix(address: Address, deadline_s: float) -> int:
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # The kernel's own timeout waits for a place in a full backlog; a non-blocking connect() would fail at once.
        connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _timeval(deadline_s))
        connection.connect(address.path)
        connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, SEND_BUFFER_SIZE)
        connection.setblocking(False)
    except (OSError, ValueError) as error:
        connection.close()
        raise _cannot_reach(address, error) from error
    return connection.detach()


def _timeval(deadline_s: float) -> bytes:
    left_us = max(1, int((deadline_s - time.monotonic()) * 1e6))
    return b"".join(part.to_bytes(LONG_SIZE, sys.byteorder) for part in divmod(left_us, 1_000_000))


def _cannot_reach(address: Address, error: Exception) -> VshError:
    code = error.errno if isinstance(error, OSError) else None
    where = f"{address.name}: {address.path}" if address.is_ours else address.path
    if code in (errno.ENOENT, errno.ECONNREFUSED):
        hint = (
            "vmkit list prints the running machines" if address.is_ours else "check the path, and that its program runs"
        )
        return Unreachable(f"nothing listens at {where}", hint=hint)
    if code == errno.EACCES:
        return VshError(f"{where} is not yours to use", hint="it belongs to another user, or its directory does")
    if code == errno.EAGAIN:
        return Busy(f"{where} does not accept connections", hint="its program is busy, stopped or stuck")
    return Unreachable(f"cannot connect to {where}: {error.strerror if isinstance(error, OSError) else error}")


def ask_for_port(address: Address, fd: int, deadline_s: float) -> None:
    """Asks a hybrid vsock for a port: sends CONNECT <port>, and reads OK <port>, or a close without an answer.

    Our own device answers FULL <places> before it closes for want of a place.
    """
    try:
        os.write(fd, b"CONNECT %d\n" % address.port)
    except BrokenPipeError:
        pass  # closed already: there is no answer to read, which is told below
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    line = b""
    while not line.endswith(b"\n"):
        if not wait_until(poll.poll, deadline_s):
            raise Unanswered(
                f"{address.name} does not answer", hint="the guest may be paused or stuck; look at its console"
            )
        try:
            data = _read_to_newline(fd, OK_LINE_MAX - len(line))
        except ConnectionResetError:
            data = b""
        if not data:
            raise Unreachable(f"nothing listens on port {address.port} of {address.name}", hint=_hint_at_port(address))
        line += data
        if line.startswith(b"FULL ") and line.endswith(b"\n"):
            places = line[5:-1].decode("ascii", "replace")
            raise Busy(
                f"{address.name} takes no more connections: all {places} places of its vsock device are taken",
                hint="end some of its sessions or forwards: each holds a place",
            )
        if len(line) >= OK_LINE_MAX or not line.startswith((b"OK "[: len(line)], b"FULL "[: len(line)])):
            raise VshError(
                f"{address.path} is no vsock of a VM: it answered {line!r}", hint="--unix is for a plain vshd"
            )


def _read_to_newline(fd: int, limit: int) -> bytes:
    """Reads from a socket, and nothing behind a newline: a server that speaks first, such as sshd, may have begun."""
    connection = _socket.socket(fileno=fd)
    try:
        seen = connection.recv(limit, _socket.MSG_PEEK)
        return connection.recv(seen.find(b"\n") + 1 or len(seen)) if seen else b""
    finally:
        connection.detach()


def _open_vsock(address: Address, deadline_s: float) -> int:
    """Opens AF_VSOCK, which no other code of vsh does. Refuses CIDs below 3, and all when VSH_AF_VSOCK=deny."""
    kinds.check_cid(address.cid)
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        raise VshError(
            f"cannot connect to {address.name}: AF_VSOCK is denied by VSH_AF_VSOCK=deny",
            hint=""
            if address.is_ours
            else f"no machine of vmkit has CID {address.cid}; vmkit list prints the running ones",
        )
    from vshd.carry.vsock import limit_connect  # noqa: PLC0415 - most machines are reached through a UNIX socket

    try:
        connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    except OSError as error:
        raise VshError(
            f"Failed to open vsock socket: {error.strerror}", hint="this kernel has no vsock: modprobe vsock"
        ) from error
    try:
        limit_connect(connection.fileno(), deadline_s - time.monotonic())
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        connection.connect((address.cid, address.port))
        connection.setblocking(False)
    except OSError as error:
        connection.close()
        raise _cannot_reach_vsock(address, error) from error
    return connection.detach()


def _cannot_reach_vsock(address: Address, error: OSError) -> VshError:
    brief = f"Failed to connect to vshd: {error.strerror or error}"
    if error.errno == errno.ENODEV:
        return Unreachable(f"{brief}: no VM has CID {address.cid}", hint="vmkit list prints the running machines")
    if error.errno == errno.ECONNRESET:
        what = f"nothing listens on port {address.port} of {address.name}"
        return Unreachable(f"{brief}: {what}", hint=_hint_at_port(address))
    if error.errno == errno.ETIMEDOUT or isinstance(error, TimeoutError):
        hint = "the guest may be paused, stuck or still booting"
        return Unanswered(f"{brief}: {address.name} does not answer", hint=hint)
    return Unreachable(brief)


def _hint_at_port(address: Address) -> str:
    if address.port == kinds.VSHD_PORT:
        return "the guest runs, but no vshd in it; it may still be booting"
    return "the guest runs, but no program in it listens there"


def listen_vsock(backlog: int, port: int | None = None) -> "tuple[_socket.socket, int]":
    """Listens on an AF_VSOCK port of this host, a free one by default. Returns socket and port. Raises VshError."""
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        raise VshError("cannot listen on vsock: AF_VSOCK is denied by VSH_AF_VSOCK=deny")
    try:
        listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    except OSError as error:
        raise VshError(f"Failed to create socket: {error.strerror}") from error
    try:
        listener.bind((kinds.UINT32_MAX, kinds.UINT32_MAX if port is None else port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise VshError(f"Failed to listen: {error.strerror}") from error
    return listener, listener.getsockname()[1]
