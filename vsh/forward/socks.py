"""The server's side of SOCKS 5 (RFC 1928), as -D speaks it: CONNECT, without authentication. Bytes in, answers out.

    client: 5, number of methods, methods           server: 5, 0
    client: 5, 1 (CONNECT), 0, kind, host, port     server: 5, code, 0, 1, 0.0.0.0, 0

The address in our answer is always 0.0.0.0:0: the guest's own end of a connection is of no use to a client of the host.
Knows nothing of sockets and of the guest.
"""

import _socket
import errno

from vsh.errors import ExecError, Unanswered, VshError

VERSION, OLD_VERSION = 5, 4
NO_AUTHENTICATION, NO_METHOD = 0, 0xFF
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4

# Codes of an answer: RFC 1928, section 6.
SUCCEEDED, FAILED, NOT_ALLOWED, NO_NETWORK, NO_HOST, REFUSED, _, NO_COMMAND, NO_KIND = range(9)
_CODES = {
    errno.ECONNREFUSED: REFUSED,
    errno.ENETUNREACH: NO_NETWORK,
    errno.EHOSTUNREACH: NO_HOST,
    errno.ETIMEDOUT: NO_HOST,
    # A name that the guest does not know.
    errno.EADDRNOTAVAIL: NO_HOST,
    errno.EACCES: NOT_ALLOWED,
    errno.EPERM: NOT_ALLOWED,
}
_COMMANDS = {2: "BIND", 3: "UDP ASSOCIATE"}
# Of names, and of addresses in letters, with the interface behind a percent sign.
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:%")
# A request up to its host; a host of fixed size and the port behind it.
_HEAD_SIZE = 4
_HOST_SIZES = {IPV4: 4, IPV6: 16}
_PORT_SIZE = 2


class SocksError(VshError):
    """A client that cannot be served. answer: what it is told before its connection is closed."""

    def __init__(self, brief: str, answer: bytes) -> None:
        super().__init__(brief)
        self.answer = answer


class SocksServer:
    """One client. Invariant: `target` is empty until the request is whole; then `rest` is what came behind it."""

    __slots__ = ("_data", "_is_greeted", "target")

    def __init__(self) -> None:
        self._data = b""
        self._is_greeted = False
        # Such as tcp:localhost:80.
        self.target = ""

    @property
    def rest(self) -> bytes:
        """What the client sent behind its request: it need not wait for the answer."""
        return self._data if self.target else b""

    def receive_data(self, data: bytes) -> bytes:
        """Returns what to send now. Raises SocksError."""
        self._data += data
        answer = b""
        if not self._is_greeted:
            answer = self._take_greeting()
        if self._is_greeted and not self.target:
            try:
                self._take_request()
            except SocksError as error:
                error.answer = answer + error.answer
                raise
        return answer

    def _take_greeting(self) -> bytes:
        if self._data and self._data[0] != VERSION:
            raise _explain_stranger(self._data)
        size = 2 + self._data[1] if len(self._data) > 1 else 2
        if len(self._data) < size:
            return b""
        methods, self._data = self._data[2:size], self._data[size:]
        if NO_AUTHENTICATION not in methods:
            answer = bytes((VERSION, NO_METHOD))
            raise SocksError("a client wants to log in; vsh -D serves clients without a password only", answer)
        self._is_greeted = True
        return bytes((VERSION, NO_AUTHENTICATION))

    def _take_request(self) -> None:
        data = self._data
        if len(data) < _HEAD_SIZE:
            return
        version, command, _, kind = data[:_HEAD_SIZE]
        if version != VERSION:
            raise SocksError(f"a client's request has the SOCKS version {version}, not 5", encode_answer(FAILED))
        if command != CONNECT:
            name = _COMMANDS.get(command, f"command {command}")
            raise SocksError(f"a client asks for {name}; vsh -D serves CONNECT only", encode_answer(NO_COMMAND))
        start = _HEAD_SIZE
        if kind == NAME:
            if len(data) == start:
                return
            size = data[start]
            start += 1
        elif kind in _HOST_SIZES:
            size = _HOST_SIZES[kind]
        else:
            raise SocksError(f"a client's request has an address of the unknown kind {kind}", encode_answer(NO_KIND))
        end = start + size + _PORT_SIZE
        if len(data) < end:
            return
        host, port = data[start : start + size], int.from_bytes(data[end - _PORT_SIZE : end], "big")
        if not port:
            raise SocksError("a client asks for port 0", encode_answer(FAILED))
        self.target = f"tcp:{_render_host(kind, host)}:{port}"
        self._data = data[end:]


def encode_answer(code: int) -> bytes:
    """The answer to a request."""
    return bytes((VERSION, code, 0, IPV4)) + bytes(_HOST_SIZES[IPV4] + _PORT_SIZE)


def choose_code(error: VshError) -> int:
    """The code that tells a client why its connection could not be opened."""
    if isinstance(error, ExecError):
        return _CODES.get(error.error, FAILED)
    return NO_HOST if isinstance(error, Unanswered) else FAILED


def _render_host(kind: int, host: bytes) -> str:
    """The host as the place of a forward has it. Raises SocksError for a name that is none."""
    if kind == IPV4:
        return _socket.inet_ntop(_socket.AF_INET, host)
    if kind == IPV6:
        return f"[{_socket.inet_ntop(_socket.AF_INET6, host)}]"
    if not host or not _LETTERS.issuperset(host):
        raise SocksError(f"a client asks for a name that cannot be: {host!r}", encode_answer(NO_HOST))
    name = host.decode("ascii")
    return f"[{name}]" if ":" in name else name


def _explain_stranger(data: bytes) -> SocksError:
    """The error for a client whose first byte is not SOCKS 5's."""
    if data[0] == OLD_VERSION:
        return SocksError("a client speaks SOCKS 4; tell it to use SOCKS 5", b"\x00\x5b" + bytes(6))
    if data[:1].isalpha():
        answer = b"HTTP/1.0 400 this is a SOCKS 5 proxy\r\nConnection: close\r\n\r\n"
        return SocksError("a client does not speak SOCKS 5; its setting is socks5h://, not http://", answer)
    return SocksError(f"a client does not speak SOCKS 5: its first byte is {data[0]}", b"")
