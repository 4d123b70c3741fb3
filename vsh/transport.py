"""Opens the connection to a vshd: UNIX sockets, hybrid vsock, and the one place of vsh that opens AF_VSOCK.

A transport is a descriptor, connected and non-blocking; above it nobody knows which kind it is. The C module `_socket`
is used directly: `socket` would be a fifth of a short command's time.
"""

import _socket
import errno
import os
import select
import struct
import time

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import Busy, Unanswered, Unreachable, VshError

# `OK 4294967295\n` has 14 bytes; more is no answer of a hybrid vsock.
OK_LINE_MAX = 32
# A UNIX socket holds 208 KiB by default, less than one full frame: with more, a frame leaves in one piece.
SEND_BUFFER_SIZE = 1 << 20


def open_transport(address: Address, deadline_s: float) -> int:
    """A connected, non-blocking descriptor, which the caller closes. deadline_s: of time.monotonic().

    Raises VshError, saying whose fault it is and what to do.
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
    """What is left until a deadline, for poll()."""
    left_s = deadline_s - time.monotonic()
    return min(max(0, int(left_s * 1000) + 1), 1 << 30) if left_s > 0 else 0


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
    return struct.pack("ll", left_us // 1_000_000, left_us % 1_000_000)


def _cannot_reach(address: Address, error: Exception) -> VshError:
    code = error.errno if isinstance(error, OSError) else None
    where = f"{address.name}: {address.path}" if address.is_ours else address.path
    if code in (errno.ENOENT, errno.ECONNREFUSED):
        hint = (
            "vmkit list shows what runs" if address.is_ours else "is the path right, and the program behind it running?"
        )
        return Unreachable(f"nothing listens at {where}", hint=hint)
    if code == errno.EACCES:
        return VshError(f"{where} is not yours to use", hint="it belongs to another user, or its directory does")
    if code == errno.EAGAIN:
        return Busy(f"{where} does not accept connections", hint="its program is busy, stopped or stuck")
    return Unreachable(f"cannot connect to {where}: {error.strerror if isinstance(error, OSError) else error}")


def ask_for_port(address: Address, fd: int, deadline_s: float) -> None:
    """The hybrid convention: CONNECT <port>, and OK <port> or a close without a word.

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
        if not poll.poll(remaining_ms(deadline_s)):
            raise Unanswered(
                f"{address.name} does not answer", hint="is the guest paused or stuck? its console may tell"
            )
        try:
            data = os.read(fd, OK_LINE_MAX - len(line))
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


def _open_vsock(address: Address, deadline_s: float) -> int:
    """The only AF_VSOCK of vsh. Never a CID below 3, never where VSH_AF_VSOCK=deny."""
    kinds.check_cid(address.cid)
    if os.environ.get("VSH_AF_VSOCK") == "deny":
        raise VshError(
            f"cannot connect to {address.name}: AF_VSOCK is denied by VSH_AF_VSOCK=deny",
            hint="" if address.is_ours else f"no machine of vmkit has CID {address.cid}; vmkit list shows what runs",
        )
    try:
        connection = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    except OSError as error:
        raise VshError(
            f"Failed to open vsock socket: {error.strerror}", hint="this kernel has no vsock: modprobe vsock"
        ) from error
    try:
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
        return Unreachable(f"{brief}: no VM has CID {address.cid}", hint="vmkit list shows what runs")
    if error.errno == errno.ECONNRESET:
        what = f"nothing listens on port {address.port} of {address.name}"
        return Unreachable(f"{brief}: {what}", hint=_hint_at_port(address))
    if error.errno == errno.ETIMEDOUT or isinstance(error, TimeoutError):
        hint = "is the guest paused, stuck or still booting?"
        return Unanswered(f"{brief}: {address.name} does not answer", hint=hint)
    return Unreachable(brief)


def _hint_at_port(address: Address) -> str:
    if address.port == kinds.VSHD_PORT:
        return "the guest runs, but no vshd in it; is it still booting?"
    return "the guest runs, but no program in it listens there"


def listen_vsock(backlog: int, port: int | None = None) -> "tuple[_socket.socket, int]":
    """A listening AF_VSOCK socket on a port of this host, a free one by default, and that port. Raises VshError."""
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
