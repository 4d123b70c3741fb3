"""The side of a guest's kernel: makes FUSE's requests, byte by byte as linux/fuse.h has them, and reads the answers.

Written apart from vmkit.shares.fuse, so that a wrong layout there does not agree with itself.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from vmkit.shares.fuse import Wire
from vmkit.shares.server import FolderServer

ROOT = 1
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK = 1, 2, 3, 4, 5, 6
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = range(8, 19)
FSYNC, GETXATTR, INIT, OPENDIR, READDIR, CREATE, READDIRPLUS, RENAME2 = 20, 22, 26, 27, 28, 35, 44, 45
# What Linux 6.12 offers, and more than is taken.
OFFERED = 0x73FF_FFFB
READ_BYTES = 1 << 20


class Found:
    """What an entry says of a file."""

    def __init__(self, entry: bytes, order: str = "<") -> None:
        self.node, self.generation, _, _, _, _ = struct.unpack_from(order + "4Q2I", entry)
        self.read_attributes(entry[40:], order)

    def read_attributes(self, data: bytes, order: str) -> None:
        (self.inode, self.size, _, _, self.modified, _, _, _, _, self.mode, self.links, self.uid, self.gid, _, _, _) = (
            struct.unpack_from(order + "6Q10I", data)
        )


class Kernel:
    """A guest's kernel before a server: each call is one request, and raises OSError as a system call does."""

    def __init__(self, answer: Callable[[bytes], bytes], order: str = "<") -> None:
        self._answer = answer
        self._unique = 0
        self.order = order
        self.init = struct.unpack_from(order + "4I2H2I2H8I", self.call(INIT, 0, "4I", 7, 41, 131_072, OFFERED))

    def call(self, opcode: int, node: int, numbers: str = "", *values: int, tail: bytes = b"") -> bytes:
        self._unique += 2
        body = struct.pack(self.order + numbers, *values) + tail
        head = struct.pack(self.order + "IIQQIIIHH", 40 + len(body), opcode, self._unique, node, 0, 0, 99, 0, 0)
        answer = self._answer(head + body)
        size, error, unique = struct.unpack_from(self.order + "IiQ", answer)
        assert (size, unique) == (len(answer), self._unique)
        if error:
            assert size == 16
            raise OSError(-error, os.strerror(-error))
        return answer[16:]

    def look_up(self, name: bytes, node: int = ROOT) -> Found:
        return Found(self.call(LOOKUP, node, tail=name + b"\0"), self.order)

    def walk(self, path: bytes) -> Found:
        found = None
        for name in path.split(b"/"):
            found = self.look_up(name, ROOT if found is None else found.node)
        assert found is not None
        return found

    def stat(self, node: int) -> Found:
        answer = self.call(GETATTR, node, "IIQ", 0, 0, 0)
        found = Found.__new__(Found)
        found.node = node
        found.read_attributes(answer[16:], self.order)
        return found

    def set(self, node: int, valid: int, *, handle: int = 0, size: int = 0, mode: int = 0, modified: int = 0) -> None:
        self.call(
            *(SETATTR, node, "IIQQQQQQIIIIIIII", valid, 0, handle, size, 0, 0, modified, 0),
            *(0, 0, 0, mode, 0, 7, 7, 0),
        )

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        handle: int = struct.unpack_from(self.order + "Q", self.call(OPEN, node, "II", flags, 0))[0]
        return handle

    def create(self, name: bytes, node: int = ROOT, flags: int = os.O_RDWR, mode: int = 0o644) -> tuple[Found, int]:
        answer = self.call(CREATE, node, "IIII", flags | os.O_CREAT, mode | 0o100000, 0o22, 0, tail=name + b"\0")
        handle: int = struct.unpack_from(self.order + "Q", answer, 128)[0]
        return Found(answer, self.order), handle

    def read(self, handle: int, size: int = READ_BYTES, offset: int = 0) -> bytes:
        return self.call(READ, ROOT, "QQIIQII", handle, offset, size, 0, 0, 0, 0)

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        answer = self.call(WRITE, ROOT, "QQIIQII", handle, offset, len(data), 0, 0, 0, 0, tail=data)
        size: int = struct.unpack_from(self.order + "II", answer)[0]
        return size

    def release(self, handle: int) -> None:
        self.call(RELEASE, ROOT, "QIIQ", handle, 0, 0, 0)

    def read_file(self, path: bytes) -> bytes:
        handle = self.open(self.walk(path).node)
        data = self.read(handle)
        self.release(handle)
        return data

    def make_folder(self, name: bytes, node: int = ROOT, mode: int = 0o755) -> Found:
        return Found(self.call(MKDIR, node, "II", mode, 0, tail=name + b"\0"), self.order)

    def make_node(self, name: bytes, mode: int, node: int = ROOT) -> None:
        self.call(MKNOD, node, "IIII", mode, 0x103, 0, 0, tail=name + b"\0")

    def make_link(self, name: bytes, target: bytes, node: int = ROOT) -> None:
        self.call(SYMLINK, node, tail=name + b"\0" + target + b"\0")

    def read_link(self, node: int) -> bytes:
        return self.call(READLINK, node)

    def link(self, node: int, name: bytes, to: int = ROOT) -> None:
        self.call(LINK, to, "Q", node, tail=name + b"\0")

    def unlink(self, name: bytes, node: int = ROOT) -> None:
        self.call(UNLINK, node, tail=name + b"\0")

    def remove_folder(self, name: bytes, node: int = ROOT) -> None:
        self.call(RMDIR, node, tail=name + b"\0")

    def rename(self, old: bytes, new: bytes, node: int = ROOT, to: int = ROOT, flags: int = 0) -> None:
        self.call(RENAME2, node, "QII", to, flags, 0, tail=old + b"\0" + new + b"\0")

    def list(self, node: int = ROOT, size: int = 4096, opcode: int = READDIRPLUS) -> dict[bytes, int]:
        """The names of a folder, with the number of each one's node; 0 where that was not told."""
        handle: int = struct.unpack_from(self.order + "Q", self.call(OPENDIR, node, "II", 0, 0))[0]
        names, offset = {}, 0
        while data := self.call(opcode, node, "QQIIQII", handle, offset, size, 0, 0, 0, 0):
            assert len(data) <= size
            while data:
                number = 0
                if opcode == READDIRPLUS:
                    number, data = Found(data, self.order).node, data[128:]
                _, offset, length, _ = struct.unpack_from(self.order + "QQII", data)
                names[data[24 : 24 + length]] = number
                data = data[24 + (length + 7) // 8 * 8 :]
        self.call(29, node, "QIIQ", handle, 0, 0, 0)
        return names

    def forget(self, node: int, count: int) -> None:
        """It has no answer."""
        head = struct.pack(self.order + "IIQQIIIHH", 48, FORGET, 4, node, 0, 0, 0, 0, 0)
        assert self._answer(head + struct.pack(self.order + "Q", count)) == b""


class Shared:
    """A folder that is shared, and the kernel that has it."""

    def __init__(self, folder: Path, *, is_read_only: bool = False, order: str = "<") -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.server = FolderServer(self._fd, Wire(order), is_read_only=is_read_only)
        self.kernel = Kernel(lambda message: self.server.answer(memoryview(message)), order)

    def __enter__(self) -> Kernel:
        return self.kernel

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.close()
        os.close(self._fd)
