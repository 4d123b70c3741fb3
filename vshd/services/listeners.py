"""The TCP sockets that listen in this network namespace: from the kernel, by sock_diag(7) or else /proc/net.

Owns the questions and the parsing of the answers. Knows nothing of who wants to know.
"""

import _socket
import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
NETLINK_SOCK_DIAG = 4
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOCK_DIAG_BY_FAMILY = 20
# net/tcp_states.h
TCP_LISTEN = 10
_HEAD = struct.Struct("=IHHII")
# The inet_diag_req_v2 before its 48 bytes of inet_diag_sockid, which names no socket.
_REQUEST = struct.Struct("=BBBBI48x")
# The inet_diag_msg up to the source's address, and its inode.
_SOURCE = struct.Struct("=BBBB2s2s16s")
_INODE = struct.Struct("=I")
_INODE_OFFSET = 68
_MESSAGE_SIZE = 72
# The kernel fills at most 32 KiB at a time.
_ANSWER_SIZE = 1 << 15
_ANSWER_TIMEOUT = struct.pack("ll", 1, 0)

# A page of /proc/net/tcp: the kernel fills one at each read.
_PAGE_SIZE = 1 << 12
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_ADDRESS_LETTERS = {8, 32}
# A program can listen on each port of each loopback address. That many are of no use.
LISTENERS_MAX = 4096

# Address, port and inode of a socket.
Seen = tuple[bytes, int, int]


class DiagLooker:
    """Asks by netlink, which costs least. Raises OSError where the kernel has no such answer."""

    def __init__(self) -> None:
        self._socket = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_DGRAM, NETLINK_SOCK_DIAG)
        try:
            self._socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, _ANSWER_TIMEOUT)
            self.look()
        except BaseException:
            self._socket.close()
            raise

    def look(self) -> list[Seen]:
        """What listens now. Raises OSError."""
        found: list[Seen] = []
        for family in (_socket.AF_INET, _socket.AF_INET6):
            body = _REQUEST.pack(family, _socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN)
            head = _HEAD.pack(_HEAD.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, 0)
            self._socket.send(head + body)
            while not parse_diag(self._socket.recv(_ANSWER_SIZE), family, found):
                pass
        return found

    def close(self) -> None:
        self._socket.close()


def parse_diag(data: bytes, sequence: int, found: list[Seen]) -> bool:
    """Adds the listeners of one datagram to `found`; whether the answer to request `sequence` is complete.

    Raises OSError for the kernel's refusal, and for what is no answer.
    """
    position = 0
    while position + _HEAD.size <= len(data):
        size, kind, _, number, _ = _HEAD.unpack_from(data, position)
        start = position + _HEAD.size
        if size < _HEAD.size or position + size > len(data):
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        # What is left of an earlier question, which was not answered in time, is none of this one.
        if number == sequence:
            if kind == NLMSG_DONE:
                return True
            if kind == NLMSG_ERROR:
                code = -int.from_bytes(data[start : start + 4], "little", signed=True)
                raise OSError(code, os.strerror(max(0, code)))
            if kind == SOCK_DIAG_BY_FAMILY and size >= _HEAD.size + _MESSAGE_SIZE and len(found) < LISTENERS_MAX:
                family, state, _, _, port, _, address = _SOURCE.unpack_from(data, start)
                if state == TCP_LISTEN:
                    inode = _INODE.unpack_from(data, start + _INODE_OFFSET)[0]
                    length = 4 if family == _socket.AF_INET else 16
                    found.append((address[:length], int.from_bytes(port, "big"), inode))
        position += size + 3 & ~3
    return False


class TableLooker:
    """Reads the kernel's tables as text. Raises OSError where there is no /proc."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        try:
            for path in _TABLES:
                try:
                    self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                except FileNotFoundError:
                    # Without IPv6 there is no second one.
                    if not self._fds:
                        raise
        except BaseException:
            self.close()
            raise

    def look(self) -> list[Seen]:
        """What listens now. Raises OSError."""
        return [listener for fd in self._fds for listener in parse_table(_read_pages(fd))]

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


def _read_pages(fd: int) -> "Iterator[bytes]":
    offset = 0
    while page := os.pread(fd, _PAGE_SIZE, offset):
        yield page
        offset += len(page)


def parse_table(pages: "Iterator[bytes]") -> list[Seen]:
    """The listeners in the text of a table. The kernel lists them first, so that connections need not be read."""
    found: list[Seen] = []
    rest = b""
    for page in pages:
        *lines, rest = (rest + page).split(b"\n")
        for line in lines:
            # sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
            words = line.split(None, 10)
            if len(words) < 10 or words[0] == b"sl":
                continue
            listener = _parse_line(words)
            if listener is None or len(found) == LISTENERS_MAX:
                return found
            found.append(listener)
        if len(rest) > _PAGE_SIZE:
            break
    return found


def _parse_line(words: list[bytes]) -> Seen | None:
    """None for a socket that does not listen, and for what is no line of a table."""
    address, _, port = words[1].partition(b":")
    try:
        if int(words[3], 16) != TCP_LISTEN or len(address) not in _ADDRESS_LETTERS or len(port) != 4:
            return None
        # Words of 32 bits, each a number of this processor's.
        numbers = [int(address[index : index + 8], 16) for index in range(0, len(address), 8)]
        return struct.pack(f"={len(numbers)}I", *numbers), int(port, 16), int(words[9])
    except (ValueError, struct.error):
        return None


Looker = DiagLooker | TableLooker


def open_looker() -> Looker:
    """The cheapest way to look. Raises OSError where there is none."""
    try:
        return DiagLooker()
    except OSError:
        return TableLooker()
