"""The packets of SFTP version 3 (draft-ietf-secsh-filexfer-02): bytes into fields, and answers into bytes.

Owns the numbers and the forms. Knows nothing of files, descriptors and connections. Names are bytes, never decoded.
"""

import struct
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

VERSION = 3
# OpenSSH's, whose clients send and take no more (sftp-common.h: SFTP_MAX_MSG_LENGTH).
PACKET_MAX = 1 << 18
# What limits@openssh.com announces: a packet less the room for its fields, as OpenSSH counts it.
DATA_MAX = PACKET_MAX - 1024
LENGTH_SIZE = 4
# Two whole packets: the rest of the second one is then the only thing that ever moves.
BUFFER_SIZE = 2 * (PACKET_MAX + LENGTH_SIZE)

# Requests.
INIT, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT, OPENDIR = 1, 3, 4, 5, 6, 7, 8, 9, 10, 11
READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK, SYMLINK = 12, 13, 14, 15, 16, 17, 18, 19, 20
EXTENDED = 200
# Answers.
VERSION_ANSWER, STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED_REPLY = 2, 101, 102, 103, 104, 105, 201

# SSH_FX_*
OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, BAD_MESSAGE, OP_UNSUPPORTED = 0, 1, 2, 3, 4, 5, 8

# SSH_FXF_*
FOR_READING, FOR_WRITING, APPENDING, CREATING, TRUNCATING, EXCLUSIVE = 1, 2, 4, 8, 16, 32

# SSH_FILEXFER_ATTR_*
ATTR_SIZE, ATTR_OWNER, ATTR_MODE, ATTR_TIMES, ATTR_EXTENDED = 1, 2, 4, 8, 1 << 31
ATTR_ALL = ATTR_SIZE | ATTR_OWNER | ATTR_MODE | ATTR_TIMES
NO_ATTRIBUTES = bytes(4)
NO_DATA = bytes(4)
# No request has a use for more.
EXTENDED_ATTRIBUTES_MAX = 64
# The kind of an extended attribute of the file system. Its data is the name, NUL and the value, or the name alone where
# it is to be removed (docs/reference/protocol.md 6.4). Others are skipped.
XATTR = b"xattr@vmkit"

_INT32 = Struct(">I")
_INT64 = Struct(">Q")
_TWO_INT32 = Struct(">II")
# A handle of ours, after its length; the offset; the number of bytes.
_TRANSFER = Struct(">IIQI")
_STATUS = Struct(">IBIII")
_DATA_HEAD = Struct(">IBII")
_HEAD = Struct(">IBI")
_HANDLE = Struct(">IBIII")
_ATTRIBUTES = Struct(">IQIIIII")
_MASK32 = (1 << 32) - 1
HANDLE_SIZE = 4
# Bytes of a DATA packet before the data.
DATA_HEAD_SIZE = _DATA_HEAD.size


class PacketError(Exception):
    """The peer sent something that is no packet of the protocol."""


class Attributes:
    """The attributes that a request sets; None: it leaves this one alone."""

    __slots__ = ("mode", "owner", "size", "times", "xattrs")

    def __init__(
        self,
        size: int | None = None,
        owner: tuple[int, int] | None = None,
        mode: int | None = None,
        times: tuple[int, int] | None = None,
        xattrs: "tuple[tuple[bytes, bytes | None], ...]" = (),
    ) -> None:
        """owner: uid and gid. times: of the last access and the last change, in seconds since 1970. xattrs: extended
        attributes by name; None: this one is to be removed.
        """
        self.size = size
        self.owner = owner
        self.mode = mode
        self.times = times
        self.xattrs = xattrs


class Fields:
    """The fields of one packet, taken in order. Invariant: `_at` is where the next one begins.

    Every method raises PacketError when the packet ends before the field does.
    """

    __slots__ = ("_at", "_data")

    def __init__(self, data: memoryview, at: int = 0) -> None:
        self._data = data
        self._at = at

    def int32(self) -> int:
        """An uint32."""
        return self._take(_INT32)

    def int64(self) -> int:
        """An uint64."""
        return self._take(_INT64)

    def string(self) -> bytes:
        """A string, as bytes of its own."""
        return bytes(self.view())

    def view(self) -> memoryview:
        """A string, as a view of the packet."""
        return self.rest(self._take(_INT32))

    def handle(self) -> int:
        """The number of a handle; one that no server of ours gave is -1."""
        handle = self.view()
        return int.from_bytes(handle, "big") if len(handle) == HANDLE_SIZE else -1

    def transfer(self) -> tuple[int, int, int]:
        """The handle, the offset and the size of a READ or, with its data still to come, of a WRITE."""
        at = self._at
        try:
            handle_size, handle, offset, size = _TRANSFER.unpack_from(self._data, at)
        except struct.error:
            handle_size = 0
        if handle_size == HANDLE_SIZE:
            self._at = at + _TRANSFER.size
            return handle, offset, size
        # A handle that is none of ours, or a packet that is too short.
        return self.handle(), self.int64(), self.int32()

    def rest(self, size: int) -> memoryview:
        """The next `size` bytes."""
        start = self._at
        if size > len(self._data) - start:
            raise PacketError("a string that is longer than its packet")
        self._at = start + size
        return self._data[start : start + size]

    def attributes(self) -> Attributes:
        """An ATTRS structure."""
        flags = self.int32()
        attributes = Attributes()
        if flags & ATTR_SIZE:
            attributes.size = self.int64()
        if flags & ATTR_OWNER:
            attributes.owner = (self.int32(), self.int32())
        if flags & ATTR_MODE:
            attributes.mode = self.int32()
        if flags & ATTR_TIMES:
            attributes.times = (self.int32(), self.int32())
        if flags & ATTR_EXTENDED:
            count = self.int32()
            if count > EXTENDED_ATTRIBUTES_MAX:
                raise PacketError(f"{count} extended attributes")
            pairs = [(self.view(), self.view()) for _ in range(count)]
            attributes.xattrs = tuple(split_xattr(bytes(data)) for kind, data in pairs if kind == XATTR)
        return attributes

    def _take(self, form: Struct) -> int:
        at = self._at
        self._at = at + form.size
        try:
            value: int = form.unpack_from(self._data, at)[0]
        except struct.error as error:
            raise PacketError("a packet that ends too early") from error
        return value


class Splitter:
    """Cuts what a connection brings into packets. Invariant: the bytes between `_start` and `_end` are not cut yet."""

    __slots__ = ("_buffer", "_end", "_start")

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(BUFFER_SIZE))
        self._start = 0
        self._end = 0

    def room(self) -> memoryview:
        """Where the next bytes go. Packets that were cut before are no longer valid."""
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
            return self._buffer
        wanted = PACKET_MAX + LENGTH_SIZE
        if end - start >= LENGTH_SIZE:
            wanted = _INT32.unpack_from(self._buffer, start)[0] + LENGTH_SIZE
        if BUFFER_SIZE - start < wanted:
            size = end - start
            self._buffer[:size] = self._buffer[start:end]
            self._start, self._end = 0, size
        return self._buffer[self._end :]

    def received(self, size: int) -> None:
        """So many bytes were put there."""
        self._end += size

    def feed(self, data: bytes) -> None:
        """Bytes that came another way; at most as many as there is room for."""
        self.room()[: len(data)] = data
        self.received(len(data))

    def packets(self) -> "Iterator[memoryview]":
        """The packets that are whole, without their lengths. Raises PacketError for a length that no packet has."""
        while self._end - self._start >= LENGTH_SIZE:
            begin = self._start + LENGTH_SIZE
            size = _INT32.unpack_from(self._buffer, self._start)[0]
            if not 0 < size <= PACKET_MAX:
                raise PacketError(f"a packet of {size} bytes")
            if self._end - begin < size:
                return
            self._start = begin + size
            yield self._buffer[begin : begin + size]


# Answers.


def render_version(extensions: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """The answer to INIT: our version, and the names and versions of the extensions."""
    body = b"".join(render_string(word) for pair in extensions for word in pair)
    return _HEAD.pack(5 + len(body), VERSION_ANSWER, VERSION) + body


def render_status(ident: int, code: int, text: bytes = b"") -> bytes:
    """A STATUS, without a language tag."""
    return _STATUS.pack(17 + len(text), STATUS, ident, code, len(text)) + text + bytes(4)


def render_handle(ident: int, handle: int) -> bytes:
    return _HANDLE.pack(13, HANDLE, ident, HANDLE_SIZE, handle)


def render_data_head(ident: int, size: int) -> bytes:
    """What precedes the `size` bytes of a DATA."""
    return _DATA_HEAD.pack(9 + size, DATA, ident, size)


def render_names(ident: int, count: int, entries: bytes) -> bytes:
    """A NAME of `count` entries, which render_entry() made."""
    return _HEAD.pack(9 + len(entries), NAME, ident) + _INT32.pack(count) + entries


def render_entry(name: bytes, long_name: bytes, attributes: bytes) -> bytes:
    return b"".join((_INT32.pack(len(name)), name, _INT32.pack(len(long_name)), long_name, attributes))


def render_attributes(size: int, uid: int, gid: int, mode: int, atime: int, mtime: int) -> bytes:
    """An ATTRS structure with all that version 3 has; times have 32 bits."""
    return _ATTRIBUTES.pack(ATTR_ALL, size, uid, gid, mode, atime & _MASK32, mtime & _MASK32)


def render_xattrs(pairs: "list[tuple[bytes, bytes]]") -> bytes:
    """An ATTRS structure of extended attributes alone."""
    words = [render_string(word) for name, value in pairs for word in (XATTR, name + b"\0" + value)]
    return _TWO_INT32.pack(ATTR_EXTENDED, len(pairs)) + b"".join(words)


def split_xattr(data: bytes) -> "tuple[bytes, bytes | None]":
    """The name and the value of an extended attribute; None: it is to be removed."""
    name, nul, value = data.partition(b"\0")
    return name, value if nul else None


def render_attributes_answer(ident: int, attributes: bytes) -> bytes:
    return _HEAD.pack(5 + len(attributes), ATTRS, ident) + attributes


def render_extended_reply(ident: int, numbers: tuple[int, ...]) -> bytes:
    """An EXTENDED_REPLY of uint64s."""
    body = b"".join(_INT64.pack(number) for number in numbers)
    return _HEAD.pack(5 + len(body), EXTENDED_REPLY, ident) + body


def render_extended_attributes(ident: int, attributes: bytes) -> bytes:
    """An EXTENDED_REPLY of attributes."""
    return _HEAD.pack(5 + len(attributes), EXTENDED_REPLY, ident) + attributes


def render_whole(ident: int, attributes: bytes, data: bytes) -> bytes:
    """An EXTENDED_REPLY of a file's attributes and its data."""
    size = 5 + len(attributes) + LENGTH_SIZE + len(data)
    return b"".join((_HEAD.pack(size, EXTENDED_REPLY, ident), attributes, _INT32.pack(len(data)), data))


def render_contents(ident: int, count: int, entries: bytes) -> bytes:
    """An EXTENDED_REPLY of entries: a name, attributes, and what render_data_size() gave with the data, or NO_DATA."""
    return _HEAD.pack(9 + len(entries), EXTENDED_REPLY, ident) + _INT32.pack(count) + entries


def render_data_size(size: int) -> bytes:
    """What precedes the data of an entry."""
    return _TWO_INT32.pack(1, size)


def render_string(data: bytes) -> bytes:
    return _INT32.pack(len(data)) + data


def take_head(packet: memoryview) -> tuple[int, int]:
    """The type of a packet, and its id, which for INIT is the version. Raises PacketError."""
    if len(packet) < 1 + LENGTH_SIZE:
        raise PacketError(f"a packet of {len(packet)} bytes")
    return packet[0], _INT32.unpack_from(packet, 1)[0]
