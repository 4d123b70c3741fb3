"""A client of SFTP for tests: requests in the draft's own terms, and the answers of the handlers, without a connection.

Written from draft-ietf-secsh-filexfer-02, and not with vshd's own encoders.
"""

import struct
from collections.abc import Callable
from typing import Self

from vshd.services.sftp.requests import Requests
from vshd.wire.output import Output

INIT, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT, OPENDIR = 1, 3, 4, 5, 6, 7, 8, 9, 10, 11
READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK, SYMLINK, EXTENDED = *range(12, 21), 200
VERSION, STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED_REPLY = 2, 101, 102, 103, 104, 105, 201

IDENT = 0xABCDEF01


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def text(value: bytes) -> bytes:
    return u32(len(value)) + value


NO_ATTRIBUTES = u32(0)


class Answer:
    """One packet of the server, without its length."""

    def __init__(self, packet: bytes) -> None:
        self.kind = packet[0]
        self.ident = int.from_bytes(packet[1:5], "big")
        self.rest = packet[5:]

    def u32(self) -> int:
        value, self.rest = int.from_bytes(self.rest[:4], "big"), self.rest[4:]
        return value

    def u64(self) -> int:
        value, self.rest = int.from_bytes(self.rest[:8], "big"), self.rest[8:]
        return value

    def text(self) -> bytes:
        size = self.u32()
        assert size <= len(self.rest)
        value, self.rest = self.rest[:size], self.rest[size:]
        return value

    def attributes(self) -> dict[str, int]:
        """By name; those that are absent are missing."""
        flags, found = self.u32(), {}
        if flags & 1:
            found["size"] = self.u64()
        for bit, names in ((2, ("uid", "gid")), (4, ("mode",)), (8, ("atime", "mtime"))):
            if flags & bit:
                found |= {name: self.u32() for name in names}
        assert not flags & ~15
        return found

    def names(self) -> list[tuple[bytes, bytes, dict[str, int]]]:
        return [(self.text(), self.text(), self.attributes()) for _ in range(self.u32())]

    def status(self) -> tuple[int, str]:
        """The code and the text."""
        assert self.kind == STATUS, self.kind
        found = self.u32(), self.text().decode()
        assert (self.text(), self.rest) == (b"", b"")
        return found


def split(data: bytes) -> list[Answer]:
    """The packets of a stream, which must be whole."""
    answers = []
    while data:
        size = int.from_bytes(data[:4], "big")
        assert 0 < size <= len(data) - 4
        answers.append(Answer(data[4 : 4 + size]))
        data = data[4 + size :]
    return answers


class Peer:
    """Invariant: every request has had its answer."""

    def __init__(self, home: bytes = b"/", is_wanted: Callable[[], bool] = lambda: True) -> None:
        self.output = Output()
        self.requests = Requests(self.output, home, is_wanted)
        (self.version,) = self._send(bytes([INIT]) + u32(3))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()

    def ask(self, kind: int, *fields: bytes) -> Answer:
        (answer,) = self._send(bytes([kind]) + u32(IDENT) + b"".join(fields))
        assert answer.ident == IDENT
        return answer

    def extended(self, name: bytes, *fields: bytes) -> Answer:
        return self.ask(EXTENDED, text(name), *fields)

    def status(self, kind: int, *fields: bytes) -> int:
        """The code of a request's status."""
        return self.ask(kind, *fields).status()[0]

    def open(self, path: bytes, flags: int, attributes: bytes = NO_ATTRIBUTES) -> bytes:
        """A handle, as a field."""
        answer = self.ask(OPEN, text(path), u32(flags), attributes)
        assert answer.kind == HANDLE, answer.status()
        return text(answer.text())

    def opendir(self, path: bytes) -> bytes:
        answer = self.ask(OPENDIR, text(path))
        assert answer.kind == HANDLE, answer.status()
        return text(answer.text())

    def _send(self, packet: bytes) -> list[Answer]:
        self.requests.take(memoryview(packet))
        return split(self.output.take())
