"""FUSE's messages (linux/fuse.h, protocol 7.31): requests out of bytes, and answers into bytes.

A message is a head and a body, and its first four bytes are its length. All numbers are in the byte order of the guest,
which its first request, INIT, shows. Owns lengths, numbers and layouts. Does no I/O, and knows no file.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Literal

from vmkit.shares.cutter import Cutter, ProtocolError
from vmkit.shares.folder import DATA_MAX, NAME_MAX, Owner

MAJOR, MINOR = 7, 31
# The body of one READ or WRITE is DATA_MAX bytes. Each message costs a guest under emulation a millisecond.
PAGE = 4096
HEAD_SIZE = 40
ORDERS: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
# Heads and names take less than a page.
MESSAGE_MAX = DATA_MAX + PAGE


class Op(IntEnum):
    """enum fuse_opcode: those that are answered with more than "not implemented"."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


class Feature(IntFlag):
    """FUSE_* of INIT: what this server can do, or leaves to the guest's kernel."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23


class Set(IntFlag):
    """FATTR_*: which attributes a SETATTR sets."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


# FOPEN_KEEP_CACHE: the file is as the guest remembers it.
KEEP_CACHE = 1 << 1
# These have no answer.
SILENT = frozenset((Op.FORGET, Op.BATCH_FORGET, Op.INTERRUPT))
# Requests in the background that the kernel has under way at once, and from which number on it calls that congested.
BACKGROUND_MAX, CONGESTED = 64, 48
# Every program reads and writes in pieces of this size, where it asks a file for one.
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class FuseShape:
    """What a request has behind its head: numbers, as struct has them, names with a zero byte each, and the rest."""

    numbers: str = ""
    names: int = 0


SHAPES = {
    Op.LOOKUP: FuseShape(names=1),
    Op.FORGET: FuseShape("Q"),
    Op.GETATTR: FuseShape("IIQ"),
    Op.SETATTR: FuseShape("IIQQQQQQIIIIIIII"),
    Op.READLINK: FuseShape(),
    Op.SYMLINK: FuseShape(names=2),
    Op.MKNOD: FuseShape("IIII", names=1),
    Op.MKDIR: FuseShape("II", names=1),
    Op.UNLINK: FuseShape(names=1),
    Op.RMDIR: FuseShape(names=1),
    Op.RENAME: FuseShape("Q", names=2),
    Op.LINK: FuseShape("Q", names=1),
    Op.OPEN: FuseShape("II"),
    Op.READ: FuseShape("QQIIQII"),
    Op.WRITE: FuseShape("QQIIQII"),
    Op.STATFS: FuseShape(),
    Op.RELEASE: FuseShape("QIIQ"),
    Op.FSYNC: FuseShape("QII"),
    Op.INIT: FuseShape("IIII"),
    Op.OPENDIR: FuseShape("II"),
    Op.READDIR: FuseShape("QQIIQII"),
    Op.RELEASEDIR: FuseShape("QIIQ"),
    Op.FSYNCDIR: FuseShape("QII"),
    Op.CREATE: FuseShape("IIII", names=1),
    Op.INTERRUPT: FuseShape("Q"),
    Op.DESTROY: FuseShape(),
    Op.BATCH_FORGET: FuseShape("II"),
    Op.READDIRPLUS: FuseShape("QQIIQII"),
    Op.RENAME2: FuseShape("QII", names=2),
}


@dataclass(frozen=True, slots=True)
class FuseRequest:
    """A request: its numbers and names, by the shape of its opcode, and what is behind them. node: whose it is.

    Invariant: `data` is valid until the next message is read.
    """

    opcode: int
    unique: int
    node: int
    numbers: tuple[int, ...]
    names: tuple[bytes, ...]
    data: memoryview


# How long the guest may keep what it knows of a file before it asks again.
VALID_S = 1


class Wire:
    """Reads and writes messages of one byte order."""

    def __init__(self, order: str) -> None:
        """order: `<` or `>`, as struct has it."""
        self._head = struct.Struct(order + "IIQQIIIHH")
        self._numbers = {opcode: struct.Struct(order + shape.numbers) for opcode, shape in SHAPES.items()}
        self._answer = struct.Struct(order + "IiQ")
        self._attributes = struct.Struct(order + "6Q10I")
        self._entry = struct.Struct(order + "4Q2I")
        self._lifetime = struct.Struct(order + "QII")
        self._init = struct.Struct(order + "4I2H2I2H8I")
        self._opened = struct.Struct(order + "QII")
        self._written = struct.Struct(order + "II")
        self._statistics = struct.Struct(order + "5Q4I24x")
        self._name = struct.Struct(order + "QQII")
        self._forgotten = struct.Struct(order + "QQ")
        # An entry of READDIRPLUS of which the guest has to ask.
        self.nothing = bytes(self._entry.size + self._attributes.size)

    # Requests.

    def parse(self, message: memoryview) -> FuseRequest:
        """One whole message. Raises ProtocolError."""
        _, opcode, unique, node, *_ = self._head.unpack_from(message)
        shape = SHAPES.get(opcode)
        body = message[self._head.size :]
        if shape is None:
            return FuseRequest(opcode, unique, node, (), (), body)
        layout = self._numbers[opcode]
        if len(body) < layout.size:
            raise ProtocolError(f"a request of kind {opcode} has {len(body)} bytes, and needs {layout.size}")
        numbers = layout.unpack_from(body)
        rest = body[layout.size :]
        if not shape.names:
            return FuseRequest(opcode, unique, node, numbers, (), rest)
        words = bytes(rest).split(b"\0", shape.names)
        if len(words) <= shape.names:
            raise ProtocolError(f"a request of kind {opcode} has a name without an end")
        return FuseRequest(opcode, unique, node, numbers, tuple(words[: shape.names]), rest[:0])

    def parse_forgotten(self, request: FuseRequest) -> Iterator[tuple[int, int]]:
        """Which nodes a BATCH_FORGET forgets, and how often. Raises ProtocolError."""
        count = request.numbers[0]
        if count * self._forgotten.size > len(request.data):
            raise ProtocolError(f"a request forgets {count} nodes, and has fewer")
        yield from self._forgotten.iter_unpack(request.data[: count * self._forgotten.size])

    # Answers.

    def render(self, unique: int, *parts: bytes) -> bytes:
        """The answer to the request `unique`."""
        size = self._answer.size + sum(map(len, parts))
        return b"".join((self._answer.pack(size, 0, unique), *parts))

    def render_error(self, unique: int, code: int) -> bytes:
        """code: an errno, the same on every architecture that vmkit knows."""
        return self._answer.pack(self._answer.size, -code, unique)

    def render_init(self, features: int) -> bytes:
        """features: those of the guest's that this server has, too."""
        numbers = (MAJOR, MINOR, DATA_MAX, features, BACKGROUND_MAX, CONGESTED, DATA_MAX, 1, DATA_MAX // PAGE, 0)
        return self._init.pack(*numbers, *bytes(8))

    def render_attributes(self, status: os.stat_result, owner: Owner) -> bytes:
        """struct fuse_attr. No file has another's device."""
        mode, uid, gid = owner.squash(status)
        times = [divmod(time_ns, 10**9) for time_ns in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
        return self._attributes.pack(
            *(status.st_ino, status.st_size, status.st_blocks),
            *(seconds & (1 << 64) - 1 for seconds, _ in times),
            *(rest_ns for _, rest_ns in times),
            *(mode, status.st_nlink, uid, gid, 0, BLOCK, 0),
        )

    def render_lifetime(self) -> bytes:
        """What is before the attributes in the answer to GETATTR and SETATTR."""
        return self._lifetime.pack(VALID_S, 0, 0)

    def render_entry(self, node: int, attributes: bytes) -> bytes:
        """struct fuse_entry_out. A name that is missing gets none: the guest looks again for it each time."""
        return self._entry.pack(node, 0, VALID_S, VALID_S, 0, 0) + attributes

    def render_opened(self, handle: int, flags: int = 0) -> bytes:
        return self._opened.pack(handle, flags, 0)

    def render_written(self, size: int) -> bytes:
        return self._written.pack(size, 0)

    def render_statistics(self, found: os.statvfs_result) -> bytes:
        return self._statistics.pack(
            *(found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree),
            *(found.f_bsize, min(found.f_namemax, NAME_MAX), found.f_frsize, 0),
        )

    def render_name(self, inode: int, offset: int, name: bytes, kind: int) -> bytes:
        """struct fuse_dirent. offset: of the entry behind it. kind: the upper bits of its mode, 0 for unknown."""
        return self._name.pack(inode, offset, len(name), kind) + name + bytes(-len(name) % 8)


class Messages(Cutter):
    """Cuts what a guest sends into messages."""

    def __init__(self) -> None:
        super().__init__(HEAD_SIZE, MESSAGE_MAX)
        self.order = ""

    def read_length(self, head: memoryview) -> int:
        """In the byte order of the first message."""
        if not self.order:
            self.order = find_order(head)
        return int.from_bytes(head[:4], ORDERS[self.order])


def find_order(message: memoryview) -> str:
    """The byte order of a guest, of its first message. Raises ProtocolError where that is not INIT."""
    for order, name in ORDERS.items():
        if int.from_bytes(message[4:8], name) == Op.INIT:
            return order
    raise ProtocolError("the first message is not INIT")
