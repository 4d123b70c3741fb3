"""The messages of 9P2000.L (diod's protocol.md, net/9p of Linux): requests out of bytes, and answers into bytes.

A message is its length, kind and tag, and a body. All numbers are little-endian. A text is its length and its bytes.
Owns lengths, numbers and layouts. Does no I/O, and knows no file.
"""

import os
import stat
import struct
from dataclasses import dataclass
from enum import IntEnum

from vmkit.shares.cutter import Cutter, ProtocolError
from vmkit.shares.folder import NAME_MAX, Owner

VERSION = b"9P2000.L"
UNKNOWN_VERSION = b"unknown"
HEAD_SIZE = 7
# The whole of one message, either way, whatever a guest asks for: the kernel's own maximum of trans=fd.
MSIZE_MAX = 1 << 20
# The longest text of a symbolic link has room.
MSIZE_MIN = 8192
# Of the answer to a read, before its data.
READ_HEAD_SIZE = HEAD_SIZE + 4
# linux/net/9p/9p.h
NAMES_MAX = 16
NO_TAG, NO_FID = (1 << 16) - 1, (1 << 32) - 1
# Every program reads and writes in pieces of this size, where it asks a file for one.
BLOCK = 1 << 16
V9FS_MAGIC = 0x01021997
# P9_GETATTR_BASIC
BASIC = 0x7FF


class NineKind(IntEnum):
    """Requests that a guest sends, by their numbers; an answer has the number behind its request's."""

    LERROR = 6
    STATFS = 8
    LOPEN = 12
    LCREATE = 14
    SYMLINK = 16
    MKNOD = 18
    RENAME = 20
    READLINK = 22
    GETATTR = 24
    SETATTR = 26
    XATTRWALK = 30
    XATTRCREATE = 32
    READDIR = 40
    FSYNC = 50
    LOCK = 52
    GETLOCK = 54
    LINK = 70
    MKDIR = 72
    RENAMEAT = 74
    UNLINKAT = 76
    VERSION = 100
    AUTH = 102
    ATTACH = 104
    FLUSH = 108
    WALK = 110
    READ = 116
    WRITE = 118
    CLUNK = 120
    REMOVE = 122


# The bodies: B, H, I and Q are numbers as struct has them, and s is a text. What follows is the request's data.
SHAPES = {
    NineKind.STATFS: "I",
    NineKind.LOPEN: "II",
    NineKind.LCREATE: "IsIII",
    NineKind.SYMLINK: "IssI",
    NineKind.MKNOD: "IsIIII",
    NineKind.RENAME: "IIs",
    NineKind.READLINK: "I",
    NineKind.GETATTR: "IQ",
    NineKind.SETATTR: "IIIIIQQQQQ",
    NineKind.XATTRWALK: "IIs",
    NineKind.XATTRCREATE: "IsQI",
    NineKind.READDIR: "IQI",
    NineKind.FSYNC: "I",
    NineKind.LOCK: "IBIQQIs",
    NineKind.GETLOCK: "IBQQIs",
    NineKind.LINK: "IIs",
    NineKind.MKDIR: "IsII",
    NineKind.RENAMEAT: "IsIs",
    NineKind.UNLINKAT: "IsI",
    NineKind.VERSION: "Is",
    NineKind.AUTH: "IssI",
    NineKind.ATTACH: "IIssI",
    NineKind.FLUSH: "H",
    NineKind.WALK: "IIH",
    NineKind.READ: "IQI",
    NineKind.WRITE: "IQI",
    NineKind.CLUNK: "I",
    NineKind.REMOVE: "I",
}
_HEAD = struct.Struct("<IBH")
_QID = struct.Struct("<BIQ")
_TEXT = struct.Struct("<H")
_ATTRIBUTES = struct.Struct("<Q13sIIIQQQQQQQQQQQQQQQ")
_STATISTICS = struct.Struct("<IIQQQQQQI")
_ENTRY = struct.Struct("<13sQB")
# A folder, a symbolic link, or another file, in a qid.
QID_FOLDER, QID_LINK, QID_FILE = 0x80, 0x02, 0x00
QIDS = {stat.S_IFDIR: QID_FOLDER, stat.S_IFLNK: QID_LINK}


def _cut_shape(shape: str) -> tuple[struct.Struct | None, ...]:
    """The layouts of the numbers between texts, each of which is None."""
    parts: list[struct.Struct | None] = []
    for index, numbers in enumerate(shape.split("s")):
        if index:
            parts.append(None)
        if numbers:
            parts.append(struct.Struct("<" + numbers))
    return tuple(parts)


_LAYOUTS = {int(kind): _cut_shape(shape) for kind, shape in SHAPES.items()}


@dataclass(frozen=True, slots=True)
class NineRequest:
    """A request: its numbers and texts, each in their order, by the shape of its kind, and what is behind them.

    Invariant: `data` is valid until the next message is read.
    """

    kind: int
    tag: int
    numbers: tuple[int, ...]
    texts: tuple[bytes, ...]
    data: memoryview


class NineMessages(Cutter):
    """Cuts what a guest sends into messages."""

    def __init__(self) -> None:
        super().__init__(HEAD_SIZE, MSIZE_MAX)

    def read_length(self, head: memoryview) -> int:
        """The first four bytes."""
        return int.from_bytes(head[:4], "little")


def parse(message: memoryview) -> NineRequest:
    """One whole message. Raises ProtocolError."""
    _, kind, tag = _HEAD.unpack_from(message)
    rest = message[HEAD_SIZE:]
    numbers: list[int] = []
    texts: list[bytes] = []
    for layout in _LAYOUTS.get(kind, ()):
        if layout is None:
            text, rest = _parse_text(kind, rest)
            texts.append(text)
            continue
        if len(rest) < layout.size:
            raise ProtocolError(f"a request of kind {kind} has {len(message)} bytes, and needs more")
        numbers += layout.unpack_from(rest)
        rest = rest[layout.size :]
    if kind == NineKind.WALK:
        for _ in range(min(numbers[2], NAMES_MAX + 1)):
            text, rest = _parse_text(kind, rest)
            texts.append(text)
    return NineRequest(kind, tag, tuple(numbers), tuple(texts), rest)


def _parse_text(kind: int, rest: memoryview) -> tuple[bytes, memoryview]:
    """A text, and what is behind it. Raises ProtocolError."""
    if len(rest) >= _TEXT.size:
        end = _TEXT.size + _TEXT.unpack_from(rest)[0]
        if len(rest) >= end:
            return bytes(rest[_TEXT.size : end]), rest[end:]
    raise ProtocolError(f"a request of kind {kind} has a text without an end")


# Answers.


def render(kind: int, tag: int, *parts: bytes) -> bytes:
    """The answer to a request of this kind and tag."""
    return b"".join((_HEAD.pack(HEAD_SIZE + sum(map(len, parts)), kind + 1, tag), *parts))


def render_error(tag: int, code: int) -> bytes:
    """code: an errno, the same on every architecture that vmkit knows."""
    return render(NineKind.LERROR, tag, pack("I", code))


def pack(numbers: str, *values: int) -> bytes:
    """Numbers, as struct has them."""
    return struct.pack("<" + numbers, *values)


def pack_text(text: bytes) -> bytes:
    return _TEXT.pack(len(text)) + text


def pack_qid(status: os.stat_result) -> bytes:
    """What a file is, in which state, and which one."""
    version = (status.st_mtime_ns ^ status.st_ctime_ns ^ status.st_size << 8) & 0xFFFFFFFF
    return _QID.pack(QIDS.get(stat.S_IFMT(status.st_mode), QID_FILE), version, status.st_ino)


def pack_attributes(status: os.stat_result, owner: Owner) -> bytes:
    """The body of Rgetattr. No file has another's device."""
    times = [divmod(time_ns, 10**9) for time_ns in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
    return _ATTRIBUTES.pack(
        *(BASIC, pack_qid(status), *owner.squash(status), status.st_nlink, 0),
        *(status.st_size, BLOCK, status.st_blocks),
        *(number & (1 << 64) - 1 for time in times for number in time),
        *(0, 0, 0, 0),
    )


def pack_statistics(found: os.statvfs_result) -> bytes:
    """The body of Rstatfs. The counts are in blocks of f_frsize, which the guest's kernel has one size for."""
    return _STATISTICS.pack(
        *(V9FS_MAGIC, found.f_frsize or found.f_bsize, found.f_blocks, found.f_bfree, found.f_bavail),
        *(found.f_files, found.f_ffree, 0, min(found.f_namemax, NAME_MAX)),
    )


def pack_name(inode: int, offset: int, name: bytes, kind: int) -> bytes:
    """An entry of Rreaddir. offset: of the entry behind it. kind: the upper bits of its mode, 0 for unknown."""
    qid = _QID.pack(QIDS.get(kind << 12, QID_FILE), 0, inode)
    return _ENTRY.pack(qid, offset, kind) + pack_text(name)
