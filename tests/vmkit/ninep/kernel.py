"""The side of a guest's kernel with 9P: makes requests byte by byte as diod's protocol.md has them, and reads answers.

Written apart from vmkit.ninep, so that a wrong layout there does not agree with itself. It has the calls of
tests.vmkit.shares.kernel: a node is a fid here, and so is an open file.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmkit.ninep.server import NineSpeaker

ROOT = 1
STATFS, LOPEN, LCREATE, SYMLINK, MKNOD, RENAME, READLINK, GETATTR, SETATTR = 8, 12, 14, 16, 18, 20, 22, 24, 26
XATTRWALK, XATTRCREATE, READDIR, FSYNC, LOCK, GETLOCK, LINK, MKDIR, RENAMEAT, UNLINKAT = (
    30,
    32,
    40,
    50,
    52,
    54,
    70,
    72,
    74,
    76,
)
VERSION, AUTH, ATTACH, FLUSH, WALK, READ, WRITE, CLUNK, REMOVE = 100, 102, 104, 108, 110, 116, 118, 120, 122
RLERROR = 7
NO_FID = 0xFFFFFFFF
NO_TAG = 0xFFFF
MSIZE = 1 << 17
# FUSE's numbers for a change, as the shared tests have them.
MODE, SIZE, MTIME = 1 << 0, 1 << 3, 1 << 5


def text(word: bytes) -> bytes:
    return struct.pack("<H", len(word)) + word


class NineFound:
    """What the guest is told of a file."""

    def __init__(self, node: int, attributes: bytes) -> None:
        self.node = node
        (self.valid, self.qid, self.mode, self.uid, self.gid, self.links, _, self.size, _, _, _, _, self.modified) = (
            struct.unpack_from("<Q13sIIIQQQQQQQQ", attributes)
        )
        assert len(attributes) == 153


class NineKernel:
    """A guest's kernel before a server: each call is one request, and raises OSError as a system call does."""

    def __init__(self, answer: Callable[[bytes], bytes], msize: int = MSIZE) -> None:
        self._answer = answer
        self._last = ROOT
        self.version = self.call(VERSION, struct.pack("<I", msize) + text(b"9P2000.L"), tag=NO_TAG)
        self.call(ATTACH, struct.pack("<II", ROOT, NO_FID) + text(b"nobody") + text(b"") + struct.pack("<I", 0))

    def call(self, kind: int, body: bytes, tag: int = 7) -> bytes:
        answer = self._answer(struct.pack("<IBH", 7 + len(body), kind, tag) + body)
        size, answered, answered_tag = struct.unpack_from("<IBH", answer)
        assert (size, answered_tag) == (len(answer), tag)
        if answered == RLERROR:
            assert size == 11
            code = struct.unpack_from("<I", answer, 7)[0]
            raise OSError(code, os.strerror(code))
        assert answered == kind + 1
        return answer[7:]

    def new_fid(self) -> int:
        self._last += 1
        return self._last

    def step(self, node: int, *names: bytes) -> tuple[int, int]:
        """A fid, and of how many names."""
        new = self.new_fid()
        answer = self.call(WALK, struct.pack("<IIH", node, new, len(names)) + b"".join(map(text, names)))
        count = struct.unpack_from("<H", answer)[0]
        assert len(answer) == 2 + 13 * count
        return new, count

    def clone(self, node: int) -> int:
        return self.step(node)[0]

    def clunk(self, node: int) -> None:
        self.call(CLUNK, struct.pack("<I", node))

    def stat(self, node: int) -> NineFound:
        return NineFound(node, self.call(GETATTR, struct.pack("<IQ", node, 0x7FF)))

    def look_up(self, name: bytes, node: int = ROOT) -> NineFound:
        return self.stat(self.step(node, name)[0])

    def walk(self, path: bytes) -> NineFound:
        names = path.split(b"/")
        new, count = self.step(ROOT, *names)
        if count < len(names):
            raise FileNotFoundError
        return self.stat(new)

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        handle = self.clone(node)
        try:
            answer = self.call(LOPEN, struct.pack("<II", handle, flags))
        except OSError:
            self.clunk(handle)
            raise
        assert len(answer) == 17
        return handle

    def create(self, name: bytes, node: int = ROOT, flags: int = os.O_RDWR, mode: int = 0o644) -> tuple[NineFound, int]:
        handle = self.clone(node)
        numbers = struct.pack("<III", flags | os.O_CREAT, mode | 0o100000, 7)
        try:
            answer = self.call(LCREATE, struct.pack("<I", handle) + text(name) + numbers)
        except OSError:
            self.clunk(handle)
            raise
        assert len(answer) == 17
        return self.look_up(name, node), handle

    def read(self, handle: int, size: int = MSIZE, offset: int = 0) -> bytes:
        answer = self.call(READ, struct.pack("<IQI", handle, offset, size))
        assert struct.unpack_from("<I", answer)[0] == len(answer) - 4
        return answer[4:]

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        answer = self.call(WRITE, struct.pack("<IQI", handle, offset, len(data)) + data)
        size: int = struct.unpack("<I", answer)[0]
        return size

    release = clunk

    def read_file(self, path: bytes) -> bytes:
        node = self.walk(path).node
        handle = self.open(node)
        data = self.read(handle)
        self.clunk(handle)
        self.clunk(node)
        return data

    def make_folder(self, name: bytes, node: int = ROOT, mode: int = 0o755) -> NineFound:
        self.call(MKDIR, struct.pack("<I", node) + text(name) + struct.pack("<II", mode, 7))
        return self.look_up(name, node)

    def make_node(self, name: bytes, mode: int, node: int = ROOT) -> None:
        self.call(MKNOD, struct.pack("<I", node) + text(name) + struct.pack("<IIII", mode, 1, 3, 7))

    def make_link(self, name: bytes, target: bytes, node: int = ROOT) -> None:
        self.call(SYMLINK, struct.pack("<I", node) + text(name) + text(target) + struct.pack("<I", 7))

    def read_link(self, node: int) -> bytes:
        return self.call(READLINK, struct.pack("<I", node))[2:]

    def link(self, node: int, name: bytes, to: int = ROOT) -> None:
        self.call(LINK, struct.pack("<II", to, node) + text(name))

    def unlink(self, name: bytes, node: int = ROOT) -> None:
        self.call(UNLINKAT, struct.pack("<I", node) + text(name) + struct.pack("<I", 0))

    def remove_folder(self, name: bytes, node: int = ROOT) -> None:
        self.call(UNLINKAT, struct.pack("<I", node) + text(name) + struct.pack("<I", 0x200))

    def rename(self, old: bytes, new: bytes, node: int = ROOT, to: int = ROOT) -> None:
        self.call(RENAMEAT, struct.pack("<I", node) + text(old) + struct.pack("<I", to) + text(new))

    def set(self, node: int, valid: int, *, handle: int = 0, size: int = 0, mode: int = 0, modified: int = 0) -> None:
        """valid: FUSE's MODE, SIZE and MTIME. handle: in place of the node."""
        bits = valid & (MODE | SIZE) | (0x120 if valid & MTIME else 0) | 0x6
        self.call(SETATTR, struct.pack("<IIIIIQQQQQ", handle or node, bits, mode, 7, 7, size, 0, 0, modified, 0))

    def list(self, node: int = ROOT, size: int = 4096) -> dict[bytes, int]:
        """The names of a folder, with the type of each."""
        handle = self.open(node, os.O_DIRECTORY)
        names, offset = {}, 0
        while data := self.call(READDIR, struct.pack("<IQI", handle, offset, size))[4:]:
            assert len(data) <= size
            while data:
                _, offset, kind, length = struct.unpack_from("<13sQBH", data)
                names[data[24 : 24 + length]] = kind
                data = data[24 + length :]
        self.clunk(handle)
        return names


class NineShared:
    """A folder that is shared, and the kernel that has it."""

    def __init__(self, folder: Path, *, is_read_only: bool = False, msize: int = MSIZE) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.server = NineSpeaker(self._fd, is_read_only=is_read_only)
        self.kernel = NineKernel(lambda message: self.server.answer(memoryview(message)), msize)

    def __enter__(self) -> NineKernel:
        return self.kernel

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.close()
        os.close(self._fd)
