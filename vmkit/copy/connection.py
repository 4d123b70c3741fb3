"""The client's side of one SFTP connection: requests out, replies in, matched by their ids. No I/O and no clock.

A request's reply may come before those of earlier requests. Invariant: each id in `_waiting` was sent once, and its
reply has not come.
"""

import struct

from vmkit.copy.wire import (
    PACKET_BYTES_MAX,
    VERSION,
    Cursor,
    DataReply,
    ExtendedReply,
    FileAttributes,
    HandleReply,
    Kind,
    NamesReply,
    Reply,
    SftpError,
    StatusReply,
    VersionReply,
    pack_text,
    parse_reply,
    parse_version,
)

# Kinds of replies besides STATUS, which every request may get.
ANSWERS: dict[Kind, type[Reply]] = {
    Kind.INIT: VersionReply,
    Kind.OPEN: HandleReply,
    Kind.OPENDIR: HandleReply,
    Kind.READ: DataReply,
    Kind.LSTAT: FileAttributes,
    Kind.STAT: FileAttributes,
    Kind.FSTAT: FileAttributes,
    Kind.READDIR: NamesReply,
    Kind.REALPATH: NamesReply,
    Kind.READLINK: NamesReply,
    Kind.EXTENDED: ExtendedReply,
}
# The draft's names of replies, for errors.
NAMES: dict[type[Reply], str] = {
    VersionReply: "VERSION",
    StatusReply: "STATUS",
    HandleReply: "HANDLE",
    DataReply: "DATA",
    NamesReply: "NAME",
    FileAttributes: "ATTRS",
    ExtendedReply: "EXTENDED_REPLY",
}
# The greeting has no id.
GREETING = -1
IDS = 1 << 32
_HEAD_BYTES = 4
# A packet's type and id.
_LEAST_BYTES = 5
_SMALL_BYTES = 64 << 10


class Ticket:
    """A request that was sent. size_bytes: of a file's data. cost_bytes: what it and its reply hold in memory."""

    __slots__ = ("cost_bytes", "kind", "size_bytes")

    def __init__(self, kind: Kind, size_bytes: int, cost_bytes: int) -> None:
        self.kind = kind
        self.size_bytes = size_bytes
        self.cost_bytes = cost_bytes


class SftpConnection:
    """Encodes requests into `output` and finds the tickets of replies."""

    def __init__(self) -> None:
        # Pieces for sendmsg; a WRITE's data is not copied.
        self.output: list[bytes | memoryview] = []
        self._waiting: dict[int, Ticket] = {}
        self._next_id = 0
        self._small = bytearray(_SMALL_BYTES)
        self._held = bytearray()
        # A packet that has begun, and how much of it is there.
        self._body: bytearray | None = None
        self._filled = 0

    @property
    def waiting(self) -> int:
        """How many requests have no reply yet."""
        return len(self._waiting)

    def send_init(self) -> Ticket:
        """Sends the greeting, which must be the first."""
        ticket = Ticket(Kind.INIT, 0, 0)
        self._waiting[GREETING] = ticket
        self.output.append(struct.pack(">IBI", 5, Kind.INIT, VERSION))
        return ticket

    def send(
        self, kind: Kind, *texts: bytes, tail: bytes = b"", data: bytes | memoryview | None = None, size_bytes: int = 0
    ) -> Ticket:
        """Sends a request of strings, then `tail`, then data as a string. size_bytes: of a READ, the wanted size."""
        number = self._next_id
        while number in self._waiting:
            number = (number + 1) % IDS
        self._next_id = (number + 1) % IDS
        body = b"".join(map(pack_text, texts)) + tail
        if data is not None:
            size_bytes = len(data)
            body += struct.pack(">I", size_bytes)
        length = _LEAST_BYTES + len(body) + (size_bytes if data is not None else 0)
        ticket = Ticket(kind, size_bytes, size_bytes + len(body))
        self._waiting[number] = ticket
        self.output.append(struct.pack(">IBI", length, kind, number) + body)
        if data:
            self.output.append(data)
        return ticket

    def get_buffer(self) -> memoryview:
        """Returns the place for the next bytes: the rest of a large packet itself, or a buffer for several."""
        if self._body is not None:
            return memoryview(self._body)[self._filled :]
        return memoryview(self._small)

    def receive(self, count: int) -> list[tuple[Ticket, Reply]]:
        """Takes `count` bytes that are in the buffer. Returns the replies that are complete. Raises SftpError."""
        replies: list[tuple[Ticket, Reply]] = []
        if self._body is not None:
            self._filled += count
            if self._filled == len(self._body):
                replies.append(self._parse(memoryview(self._body)))
                self._body = None
            return replies
        self._held += memoryview(self._small)[:count]
        at = 0
        while len(self._held) - at >= _HEAD_BYTES:
            length = int.from_bytes(self._held[at : at + _HEAD_BYTES], "big")
            if not _LEAST_BYTES <= length <= PACKET_BYTES_MAX:
                raise SftpError(f"the guest's SFTP server sent a packet of {length} bytes")
            at += _HEAD_BYTES
            piece = self._held[at : at + length]
            at += len(piece)
            if len(piece) < length:
                self._begin(piece, length)
                break
            replies.append(self._parse(memoryview(piece)))
        del self._held[:at]
        return replies

    def _begin(self, piece: bytearray, length: int) -> None:
        """Keeps the start of a packet; the rest is received into its place."""
        self._filled = len(piece)
        piece.extend(bytes(length - len(piece)))
        self._body = piece

    def _parse(self, body: memoryview) -> tuple[Ticket, Reply]:
        kind = body[0]
        reply: Reply
        if kind == Kind.VERSION:
            number, reply = GREETING, self._check_version(parse_version(body[1:]))
        else:
            cursor = Cursor(body[1:])
            number = cursor.take_number()
            reply = parse_reply(kind, cursor)
        ticket = self._waiting.pop(number, None)
        if ticket is None:
            raise SftpError(f"the guest's SFTP server answered request {number}, which was not sent or has its answer")
        if not isinstance(reply, StatusReply) and type(reply) is not ANSWERS.get(ticket.kind):
            raise SftpError(f"the guest's SFTP server answered {ticket.kind.name} with {NAMES[type(reply)]}")
        if isinstance(reply, DataReply) and not 0 < len(reply.view) <= ticket.size_bytes:
            raise SftpError(
                f"the guest's SFTP server sent {len(reply.view)} bytes for a read of {ticket.size_bytes} bytes"
            )
        return ticket, reply

    def _check_version(self, version: VersionReply) -> VersionReply:
        if version.number != VERSION:
            raise SftpError(f"the guest's SFTP server has version {version.number}, and vmkit needs {VERSION}")
        return version
