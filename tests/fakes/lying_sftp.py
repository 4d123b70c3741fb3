"""An SFTP server that lies, as a hostile guest's may: argv[1] names the lie, all else it answers as a good server does.

Its one tree is the directory `t` with the file `f`, which has the data `DATA`.
"""

import itertools
import struct
import sys
import time
from collections.abc import Iterator

INIT, OPEN, CLOSE, READ, LSTAT, FSTAT, OPENDIR, READDIR, STAT, READLINK = 1, 3, 4, 5, 7, 8, 11, 12, 17, 19
EXTENDED, REPLY = 200, 201
VERSION, STATUS, HANDLE, DATA_REPLY, NAME, ATTRS = 2, 101, 102, 103, 104, 105
DIRECTORY, FILE, LINK = 0o040755, 0o100644, 0o120777
DATA = b"good data"
NAMES = {"slash": b"../evil", "inner-slash": b"a/b", "nul": b"a\0b", "empty": b"", "long": b"x" * 300}


def text(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def attributes(mode: int, size: int = 0) -> bytes:
    return struct.pack(">IQI", 1 | 4, size, mode)


READ_FILE = b"read-file@vmkit"
# Answers to it. "whole-status" has none, and calls that success.
WHOLE = {
    "whole-size": attributes(FILE, 1 << 40) + text(DATA),
    "whole-mode": attributes(LINK, len(DATA)) + text(DATA),
    "whole-length": attributes(FILE, len(DATA)) + struct.pack(">I", 1 << 30) + DATA,
    "whole-cut": attributes(FILE, len(DATA))[:7],
    "whole-status": b"",
}


def extended(*names: bytes) -> bytes:
    """An ATTRS structure of extended attributes, each with the value 1."""
    pairs = b"".join(text(b"xattr@vmkit") + text(name + b"\0" + b"1") for name in names)
    return struct.pack(">II", 1 << 31, len(names)) + pairs


READ_FOLDER = b"read-folder@vmkit"


def content(name: bytes, mode: int, size: int, data: bytes) -> bytes:
    """One entry of an answer to read-folder."""
    return text(name) + attributes(mode, size) + struct.pack(">I", 1) + text(data)


# Answers to it.
FOLDERS = {
    "folder-slash": struct.pack(">I", 1) + content(b"../evil", FILE, 4, b"evil"),
    "folder-size": struct.pack(">I", 1) + content(b"f", FILE, 1 << 40, DATA),
    "folder-link": struct.pack(">I", 1) + content(b"f", LINK, len(DATA), DATA),
    "folder-large": struct.pack(">I", 1) + content(b"f", FILE, 50_000, bytes(50_000)),
    "folder-count": struct.pack(">I", 1 << 30) + content(b"f", FILE, len(DATA), DATA),
    "folder-twice": struct.pack(">I", 2) + 2 * content(b"f", FILE, len(DATA), DATA),
    "folder-none": struct.pack(">I", 0),
    "folder-endless": struct.pack(">I", 1) + content(b"f", FILE, len(DATA), DATA),
    "folder-status": b"",
}

XATTRS = b"xattrs@vmkit"
# Answers to it.
ATTRIBUTES = {
    "xattrs": extended(b"security.capability", b"trusted.x", b"system.y", b"user.good", b"nothing", b""),
    "xattrs-name": extended(b"user." + b"x" * 300),
}


class Server:
    """Answers requests in their order."""

    def __init__(self, lie: str) -> None:
        self.lie = lie
        self.reads = 0
        self.stats = 0
        self.listing: Iterator[list[tuple[bytes, bytes]]] = iter(())

    def list_names(self) -> Iterator[list[tuple[bytes, bytes]]]:
        good = (b"f", attributes(FILE, self.size()))
        yield [(b".", attributes(DIRECTORY)), (b"..", attributes(DIRECTORY)), good]
        if self.lie in NAMES:
            yield [(NAMES[self.lie], attributes(FILE, 4))]
        elif self.lie == "twice":
            yield [good]
        elif self.lie == "endless":
            for number in itertools.count():
                yield [(b"n%d" % (number * 100 + one), attributes(LINK)) for one in range(100)]
        elif self.lie == "no-names":
            yield []
        elif self.lie == "link":
            yield [(b"l", attributes(LINK))]
        elif self.lie == "nested":
            yield [(b"d", attributes(DIRECTORY))]

    def size(self) -> int:
        self.stats += 1
        sizes = {"huge": (1 << 64) - 1, "shrinks": 1 << 20, "large": 1 << 30, "grows": self.stats * 1_000_000}
        return sizes.get(self.lie, len(DATA))

    def read(self, offset: int, size: int) -> bytes | None:
        self.reads += 1
        if self.lie in ("large", "grows", "overflow"):
            return bytes(size + (self.lie == "overflow"))
        if self.lie == "no-data":
            return b""
        return DATA[offset : offset + size] or None

    def answer(self, kind: int, body: bytes) -> bytes:
        if kind == INIT:
            name = READ_FILE if self.lie in WHOLE else READ_FOLDER if self.lie in FOLDERS else XATTRS
            extensions = text(name) + text(b"1") if self.lie in (*WHOLE, *FOLDERS, *ATTRIBUTES) else b""
            return self.frame(VERSION, struct.pack(">I", 6 if self.lie == "version" else 3) + extensions)
        number, rest = body[:4], body[4:]
        if self.lie == "wrong-id" and kind == READ:
            number = struct.pack(">I", 12345)
        if self.lie == "exit" and kind == READ:
            sys.exit(0)
        if self.lie == "silence" and kind == READ:
            time.sleep(600)
        reply = self.frame(*self.reply(kind, rest, number))
        return reply * 2 if self.lie == "two-replies" and kind == READ else reply

    def reply(self, kind: int, rest: bytes, number: bytes) -> tuple[int, bytes]:
        status = struct.pack(">I", 0) + text(b"ok") + text(b"")
        if kind in (OPEN, OPENDIR):
            if kind == OPENDIR:
                self.listing = self.list_names()
            handle = b"x" * 300 if self.lie == "handle" else b"h"
            return (STATUS, number + status) if self.lie == "no-handle" else (HANDLE, number + text(handle))
        if kind in (LSTAT, STAT, FSTAT):
            is_file = kind == FSTAT or rest.endswith(b"/f")
            return ATTRS, number + (attributes(FILE, self.size()) if is_file else attributes(DIRECTORY))
        if kind == READDIR:
            names = next(self.listing, None)
            if names is None:
                return STATUS, number + struct.pack(">I", 1) + text(b"end") + text(b"")
            count = 1 << 30 if self.lie == "count" else len(names)
            rows = b"".join(text(name) + text(b"long") + attrs for name, attrs in names)
            return NAME, number + struct.pack(">I", count) + rows
        if kind == EXTENDED and self.lie in WHOLE:
            return (STATUS, number + status) if self.lie == "whole-status" else (REPLY, number + WHOLE[self.lie])
        if kind == EXTENDED and self.lie in FOLDERS:
            answer = FOLDERS[self.lie]
            return (REPLY, number + answer) if answer else (STATUS, number + status)
        if kind == EXTENDED and self.lie in ATTRIBUTES:
            return REPLY, number + ATTRIBUTES[self.lie]
        if kind == READLINK:
            return NAME, number + struct.pack(">I", 1) + text(b"a\0b") + text(b"") + attributes(LINK)
        if kind == READ:
            if self.lie == "wrong-type":
                return ATTRS, number + attributes(FILE)
            if self.lie == "no-reply-type":
                return 77, number
            size = struct.unpack(">I", rest[-4:])[0]
            data = self.read(struct.unpack(">Q", rest[-12:-4])[0], size)
            if data is None:
                return STATUS, number + struct.pack(">I", 1) + text(b"end") + text(b"")
            return DATA_REPLY, number + text(data)
        return STATUS, number + status

    def frame(self, kind: int, body: bytes) -> bytes:
        if self.lie == "oversized" and kind == DATA_REPLY:
            return struct.pack(">IB", 1 << 30, kind) + body
        if self.lie == "cut" and kind == DATA_REPLY:
            body = body[:6]
        return struct.pack(">IB", len(body) + 1, kind) + body


def main() -> None:
    server = Server(sys.argv[1])
    source, target = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(4):
        packet = source.read(int.from_bytes(head, "big"))
        target.write(server.answer(packet[0], packet[1:]))
        target.flush()


if __name__ == "__main__":
    main()
