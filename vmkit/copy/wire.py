"""SFTP version 3 in bytes (draft-ietf-secsh-filexfer-02, and OpenSSH's PROTOCOL for its extensions). No I/O.

Owns the forms of requests and replies. A reply comes from a guest, so each length and number has a range.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vmkit.errors import VmkitError

VERSION: Final = 3
# OpenSSH reads and writes at most so much in one request (SFTP_MAX_MSG_LENGTH less its head).
CHUNK_BYTES_MAX: Final = (256 << 10) - 1024
PACKET_BYTES_MAX: Final = 256 << 10
# draft 3: what every server takes.
CHUNK_BYTES_DEFAULT: Final = 32 << 10
NAME_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 4096
# Of a guest's own text, an error shows this much.
SHOWN_BYTES: Final = 200
NAMES_MAX: Final = 10_000
EXTENSIONS_MAX: Final = 100

POSIX_RENAME: Final = b"posix-rename@openssh.com"
FSYNC: Final = b"fsync@openssh.com"
HARD_LINK: Final = b"hardlink@openssh.com"
STATVFS: Final = b"statvfs@openssh.com"
LIMITS: Final = b"limits@openssh.com"
# vshd's own, docs/reference/protocol.md 6.3.
READ_FILE: Final = b"read-file@vmkit"
WRITE_FILE: Final = b"write-file@vmkit"
# 6.4: the extension, and the kind of an extended attribute in ATTRS.
XATTRS: Final = b"xattrs@vmkit"
XATTR: Final = b"xattr@vmkit"
XATTRS_MAX: Final = 64
XATTRS_BYTES_MAX: Final = 128 << 10
READ_FOLDER: Final = b"read-folder@vmkit"
WHOLE_BYTES_MAX: Final = 32 << 10
WRITE_FILE_SYNC = 1

HAS_SIZE = 1
HAS_OWNER = 2
HAS_MODE = 4
HAS_TIMES = 8
HAS_ALL = HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES
HAS_MORE = 1 << 31

OPEN_READ = 1
OPEN_WRITE = 2
OPEN_CREATE = 8
OPEN_EXCLUSIVE = 0x20

# linux/statfs.h
ST_RDONLY = 1


# Flags, size, uid, gid, mode, atime, mtime.
_ALL_ATTRIBUTES: Final = struct.Struct(">IQIIIII")


class Kind(IntEnum):
    """Packet types."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    LSTAT = 7
    FSTAT = 8
    SETSTAT = 9
    FSETSTAT = 10
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    RMDIR = 15
    REALPATH = 16
    STAT = 17
    RENAME = 18
    READLINK = 19
    SYMLINK = 20
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Code(IntEnum):
    """Status codes."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    UNSUPPORTED = 8


# Extended attributes by name; the value None: it is to be removed.
Xattrs = tuple[tuple[bytes, bytes | None], ...]


class SftpError(VmkitError):
    """The guest's SFTP server sent what the protocol does not allow. The copy ends."""


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """Attributes of a file; None: not given."""

    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    atime_s: int | None = None
    mtime_s: int | None = None
    xattrs: Xattrs = ()


@dataclass(frozen=True, slots=True)
class StatusReply:
    """The end of a request. code: a Code, or a number that this version does not know."""

    code: int
    message: bytes


@dataclass(frozen=True, slots=True)
class HandleReply:
    """An open file or directory of the server."""

    value: bytes


@dataclass(frozen=True, slots=True)
class DataReply:
    """Bytes of a file, a view of the packet that they came in."""

    view: memoryview


@dataclass(frozen=True, slots=True)
class NamesReply:
    """Names of a directory, or one path. Invariant: bytes as the guest sent them, not checked as names."""

    names: tuple[tuple[bytes, FileAttributes], ...]


@dataclass(frozen=True, slots=True)
class ExtendedReply:
    """The answer to an extended request."""

    body: memoryview


@dataclass(frozen=True, slots=True)
class VersionReply:
    """The server's greeting: its version, and the names of its extensions."""

    number: int
    extensions: frozenset[bytes]


Reply = StatusReply | HandleReply | DataReply | NamesReply | FileAttributes | ExtendedReply | VersionReply


def pack_text(text: bytes) -> bytes:
    """Returns a string with its length."""
    return struct.pack(">I", len(text)) + text


def pack_attributes(attributes: FileAttributes) -> bytes:
    """Returns the attributes that are given. A half pair (uid without gid, one time alone) is left out."""
    flags, body = 0, b""
    if attributes.size is not None:
        flags |= HAS_SIZE
        body += struct.pack(">Q", attributes.size)
    if attributes.uid is not None and attributes.gid is not None:
        flags |= HAS_OWNER
        body += struct.pack(">II", attributes.uid, attributes.gid)
    if attributes.mode is not None:
        flags |= HAS_MODE
        body += struct.pack(">I", attributes.mode)
    if attributes.atime_s is not None and attributes.mtime_s is not None:
        flags |= HAS_TIMES
        body += struct.pack(">II", attributes.atime_s, attributes.mtime_s)
    if attributes.xattrs:
        flags |= HAS_MORE
        body += struct.pack(">I", len(attributes.xattrs))
        for name, value in attributes.xattrs:
            body += pack_text(XATTR) + pack_text(name if value is None else name + b"\0" + value)
    return struct.pack(">I", flags) + body


class Cursor:
    """Reads the fields of a packet in their order. Each method raises SftpError where the packet is too short."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def take_number(self) -> int:
        """Returns a number of 32 bits."""
        return int.from_bytes(self._take(4), "big")

    def take_long(self) -> int:
        """Returns a number of 64 bits."""
        return int.from_bytes(self._take(8), "big")

    def take_view(self) -> memoryview:
        """Returns a string as a view."""
        return self._take(self.take_number())

    def take_text(self) -> bytes:
        """Returns a string as bytes of its own."""
        return bytes(self.take_view())

    def take_attributes(self) -> FileAttributes:
        """Returns attributes."""
        end = self._at + _ALL_ATTRIBUTES.size
        if end <= len(self._view):
            # A listing has this form for each name, so it is read in one step.
            flags, *numbers = _ALL_ATTRIBUTES.unpack_from(self._view, self._at)
            if flags == HAS_ALL:
                self._at = end
                return FileAttributes(*numbers)
        flags = self.take_number()
        size = self.take_long() if flags & HAS_SIZE else None
        uid, gid = (self.take_number(), self.take_number()) if flags & HAS_OWNER else (None, None)
        mode = self.take_number() if flags & HAS_MODE else None
        atime, mtime = (self.take_number(), self.take_number()) if flags & HAS_TIMES else (None, None)
        xattrs: list[tuple[bytes, bytes | None]] = []
        if flags & HAS_MORE:
            for _ in range(self._take_count(EXTENSIONS_MAX)):
                kind, data = self.take_text(), self.take_view()
                if kind == XATTR:
                    name, nul, value = bytes(data).partition(b"\0")
                    xattrs.append((name, value if nul else None))
        return FileAttributes(size, uid, gid, mode, atime, mtime, tuple(xattrs))

    def take_names(self) -> NamesReply:
        """Returns the names of a listing. The long form of `ls -l` is left out."""
        names = []
        for _ in range(self._take_count(NAMES_MAX)):
            name = self.take_text()
            self.take_view()
            names.append((name, self.take_attributes()))
        return NamesReply(tuple(names))

    def take_contents(self) -> "list[tuple[bytes, FileAttributes, memoryview | None]]":
        """Returns the names of an answer to read-folder, with the data of those that have it."""
        contents: list[tuple[bytes, FileAttributes, memoryview | None]] = []
        for _ in range(self._take_count(NAMES_MAX)):
            name, attributes = self.take_text(), self.take_attributes()
            contents.append((name, attributes, self.take_view() if self.take_number() else None))
        return contents

    def take_rest(self) -> memoryview:
        """Returns what is left."""
        return self._take(len(self._view) - self._at)

    @property
    def has_more(self) -> bool:
        """Whether a field is left."""
        return self._at < len(self._view)

    def _take_count(self, limit: int) -> int:
        count = self.take_number()
        if count > limit:
            raise SftpError(f"the guest's SFTP server sent a list of {count} items")
        return count

    def _take(self, size: int) -> memoryview:
        end = self._at + size
        if end > len(self._view):
            raise SftpError("the guest's SFTP server sent a packet that is too short")
        piece = self._view[self._at : end]
        self._at = end
        return piece


def parse_version(view: memoryview) -> VersionReply:
    """Reads the body of a VERSION packet. Raises SftpError."""
    cursor = Cursor(view)
    number = cursor.take_number()
    names: set[bytes] = set()
    while cursor.has_more:
        names.add(cursor.take_text())
        cursor.take_view()
        if len(names) > EXTENSIONS_MAX:
            raise SftpError("the guest's SFTP server sent too many extensions")
    return VersionReply(number, frozenset(names))


def parse_reply(kind: int, cursor: Cursor) -> Reply:
    """Reads what follows a reply's id. Raises SftpError for a packet that is no reply."""
    match kind:
        case Kind.STATUS:
            code = cursor.take_number()
            # Servers of version 2 send no text.
            message = bytes(cursor.take_view()[:SHOWN_BYTES]) if cursor.has_more else b""
            return StatusReply(code, message)
        case Kind.HANDLE:
            handle = cursor.take_text()
            # draft 3: at most 256.
            if not 0 < len(handle) <= 256:
                raise SftpError(f"the guest's SFTP server sent a handle of {len(handle)} bytes")
            return HandleReply(handle)
        case Kind.DATA:
            return DataReply(cursor.take_view())
        case Kind.NAME:
            return cursor.take_names()
        case Kind.ATTRS:
            return cursor.take_attributes()
        case Kind.EXTENDED_REPLY:
            return ExtendedReply(cursor.take_rest())
        case _:
            raise SftpError(f"the guest's SFTP server sent a packet of type {kind}, which is not a reply")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes in one request, and how many files it keeps open; 0: it does not limit them."""

    read_bytes: int = CHUNK_BYTES_DEFAULT
    write_bytes: int = CHUNK_BYTES_DEFAULT
    handles: int = 0


def parse_limits(body: memoryview) -> Limits:
    """Reads the answer to limits@openssh.com, within the limits of this client. Raises SftpError."""
    cursor = Cursor(body)
    cursor.take_long()
    read, write, handles = cursor.take_long(), cursor.take_long(), cursor.take_long()
    return Limits(
        min(read or CHUNK_BYTES_MAX, CHUNK_BYTES_MAX), min(write or CHUNK_BYTES_MAX, CHUNK_BYTES_MAX), handles
    )


@dataclass(frozen=True, slots=True)
class Room:
    """A file system's room."""

    free_blocks: int
    free_files: int
    files: int
    is_read_only: bool


def parse_room(body: memoryview) -> Room:
    """Reads the answer to statvfs@openssh.com. Raises SftpError."""
    cursor = Cursor(body)
    # bsize, frsize, blocks, bfree, bavail, files, ffree, favail, fsid, flag, namemax
    numbers = [cursor.take_long() for _ in range(11)]
    return Room(numbers[4], numbers[7], numbers[5], bool(numbers[9] & ST_RDONLY))


def check_name(name: bytes) -> bytes:
    """Returns a name of a listing. Raises SftpError for what a directory cannot have; `.` and `..` are the caller's."""
    if not name or b"/" in name or b"\0" in name or len(name) > NAME_BYTES_MAX:
        raise SftpError(f"the guest's SFTP server sent a name that no file can have: {name[:SHOWN_BYTES]!r}")
    return name
