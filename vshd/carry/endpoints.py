"""Places of this system that a forward connects to or listens at: `tcp:HOST:PORT`, `unix:PATH`, `vsock:CID:PORT`.

Owns the sockets' making, and names what goes wrong by errno. Knows nothing of sessions and of who asks.
"""

import _socket
import errno
import os
import select
import struct
import time

from vshd.carry import vsock
from vshd.carry.sockets import ListeningSocket, listen_at

BACKLOG = 128
TCP_PORT_MAX = 0xFFFF
# linux/un.h, with its closing NUL
UNIX_PATH_MAX = 107
_TCP = (_socket.AF_INET, _socket.AF_INET6)
# A system without IPv6, or one whose loopback has no ::1.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
# How often to look for a port that is free for both addresses.
ATTEMPTS_MAX = 16


class PlaceError(Exception):
    """It cannot be reached, or listened at: what was tried and why not; error is the errno, 0 for none."""

    def __init__(self, text: str, error: int = 0) -> None:
        super().__init__(text)
        self.error = error


def connect(place: str, timeout_s: float) -> int:
    """A connected, non-blocking descriptor, to the first address of the place that answers. Raises PlaceError."""
    deadline_s = time.monotonic() + timeout_s
    code = 0
    for family, address in _find_addresses(place, is_passive=False):
        connection = _open(family, place)
        code = connection.connect_ex(address)
        if code == errno.EINPROGRESS:
            code = _wait_for_connect(connection, deadline_s)
        elif code == errno.EAGAIN:
            code = _wait_for_backlog(connection, address, deadline_s)
        if not code:
            return connection.detach()
        connection.close()
    raise explain_connect(place, code)


def start_connect(place: str) -> "_socket.socket":
    """A non-blocking socket whose connect() is done or under way, to the place's first address. Raises PlaceError."""
    family, address = _find_addresses(place, is_passive=False)[0]
    connection = _open(family, place)
    # A UNIX socket whose backlog is full says EAGAIN: there is no waiting for it without blocking.
    code = connection.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        connection.close()
        raise explain_connect(place, code)
    return connection


def _wait_for_connect(connection: "_socket.socket", deadline_s: float) -> int:
    """The errno of a connect() under way, 0 when it succeeded."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLOUT)
    if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000 + 1):
        return errno.ETIMEDOUT
    return connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)


def _wait_for_backlog(connection: "_socket.socket", address: "tuple[object, ...] | str", deadline_s: float) -> int:
    """The errno of a connect() to a UNIX socket whose backlog is full: only a blocking one waits for a place there."""
    left_us = max(1, int((deadline_s - time.monotonic()) * 1e6))
    connection.setblocking(True)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", *divmod(left_us, 1_000_000)))
    code = connection.connect_ex(address)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    connection.setblocking(False)
    return errno.ETIMEDOUT if code == errno.EAGAIN else code


def explain_connect(place: str, code: int) -> PlaceError:
    """The error for a connect() that ended with this errno."""
    return PlaceError(f"cannot connect to {place}: {os.strerror(code)}", code)


def listen(place: str) -> ListeningSocket:
    """A listening, non-blocking socket; only its owner may reach one with a path. Raises PlaceError.

    Of a name's addresses it takes one of IPv4 if there is one: who is told `localhost` tries 127.0.0.1 as well as ::1.
    """
    addresses = _find_addresses(place, is_passive=True)
    family, address = next((found for found in addresses if found[0] == _socket.AF_INET), addresses[0])
    try:
        if isinstance(address, str):
            bound = listen_at(address, BACKLOG)
            bound.socket.setblocking(False)
            return bound
        return ListeningSocket(_listen_without_path(family, address, place))
    except OSError as error:
        raise PlaceError(f"cannot listen at {place}: {error.strerror or error}", error.errno or 0) from error


def listen_on_each(place: str) -> list[ListeningSocket]:
    """Listens at 127.0.0.1 and, where there is one, at ::1 for `tcp:localhost:PORT`, with one port. Programs try the
    two in the order that their resolver gives. Other places have one listener. Raises PlaceError.
    """
    _, is_localhost, port = place.partition("tcp:localhost:")
    if not is_localhost:
        return [listen(place)]
    attempts = ATTEMPTS_MAX if port == "0" else 1
    while True:
        attempts -= 1
        first = listen(f"tcp:127.0.0.1:{port}")
        try:
            return [first, listen(f"tcp:[::1]:{first.socket.getsockname()[1]}")]
        except PlaceError as error:
            if error.error in _NO_IPV6:
                return [first]
            first.close()
            # The port that the kernel chose for one address may be taken at the other one.
            if error.error != errno.EADDRINUSE or not attempts:
                raise


def _listen_without_path(family: int, address: "tuple[object, ...]", place: str) -> "_socket.socket":
    listener = _open(family, place)
    try:
        if family in _TCP:
            listener.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def render(listener: ListeningSocket, place: str, *, is_one_of_two: bool = False) -> str:
    """The place a socket listens at, with the port that the kernel chose. is_one_of_two: localhost's."""
    if is_one_of_two:
        return f"tcp:localhost:{listener.socket.getsockname()[1]}"
    if listener.socket.family not in _TCP:
        return place
    host, port = listener.socket.getsockname()[:2]
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def _open(family: int, place: str) -> "_socket.socket":
    try:
        opened = vsock.open_socket() if family == _socket.AF_VSOCK else _socket.socket(family, _socket.SOCK_STREAM)
    except OSError as error:
        raise PlaceError(f"cannot use {place}: {error.strerror}", error.errno or 0) from error
    except vsock.VsockError as error:
        raise PlaceError(f"cannot use {place}: {error}") from error
    opened.setblocking(False)
    return opened


def _find_addresses(place: str, *, is_passive: bool, flags: int = 0) -> "list[tuple[int, tuple[object, ...] | str]]":
    """Families and addresses of a place, at least one. Raises PlaceError."""
    kind, _, rest = place.partition(":")
    if kind == "unix" and rest and "\0" not in rest:
        if len(os.fsencode(rest)) > UNIX_PATH_MAX:
            raise PlaceError(f"{place}: the path is longer than a socket's can be", errno.ENAMETOOLONG)
        return [(_socket.AF_UNIX, rest)]
    host, _, port = rest.rpartition(":")
    if port.isascii() and port.isdigit():
        if kind == "vsock" and host.isascii() and host.isdigit() and max(int(host), int(port)) < vsock.ANY:
            return [(_socket.AF_VSOCK, (int(host), int(port)))]
        if kind == "tcp" and host and int(port) <= TCP_PORT_MAX:
            flags |= _socket.AI_PASSIVE if is_passive else 0
            return _look_up(place, host.removeprefix("[").removesuffix("]"), int(port), flags)
    raise PlaceError(f"'{place}' is no place", errno.EINVAL)


def find_fixed(place: str) -> "list[tuple[int, tuple[object, ...] | str]]":
    """Families and addresses of a place whose addresses stay, at least one: a look-up of any other name can take long,
    and give others later. Raises PlaceError.
    """
    host = place.removeprefix("tcp:").rpartition(":")[0]
    if not place.startswith("tcp:") or host == "localhost":
        return _find_addresses(place, is_passive=False)
    return _find_addresses(place, is_passive=False, flags=_socket.AI_NUMERICHOST)


def begin_connect(family: int, address: "tuple[object, ...] | str", place: str) -> "tuple[_socket.socket, int]":
    """A non-blocking socket and how its connect() to one address of a place stands: 0 done, EINPROGRESS under way,
    EAGAIN for a UNIX socket whose backlog is full, else why it failed. Raises PlaceError when there is no socket.
    """
    connection = _open(family, place)
    code = connection.connect_ex(address)
    if code == errno.EINPROGRESS:
        # Over loopback the connection stands by now, and asking once more costs less than a turn of a loop.
        code = connection.connect_ex(address)
    if code == errno.EISCONN:
        code = 0
    return connection, errno.EINPROGRESS if code == errno.EALREADY else code


def _look_up(place: str, host: str, port: int, flags: int) -> "list[tuple[int, tuple[object, ...] | str]]":
    try:
        # As bytes, an ASCII name needs no codec: Python would load one, and for all names the tables of Unicode.
        name = host.encode() if host.isascii() else host
        found = _socket.getaddrinfo(None if host == "*" else name, port, 0, _socket.SOCK_STREAM, 0, flags)
    except (OSError, UnicodeError, LookupError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no such name"
        raise PlaceError(f"cannot find {place}: {reason}", errno.EADDRNOTAVAIL) from error
    return [(family, address) for family, _, _, _, address in found]
