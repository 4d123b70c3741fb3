"""A file of a guest as a file object: SFTP version 3 over a connection of its own, one request at a time.

Owns the requests that a file needs, and their answers. What the guest sends has limits: a packet, the data of a read,
the time until an answer. vshd's own errors are those of open(): an OSError with the errno, found by its text.
"""

import errno
import io
import os
import socket
import struct
from typing import BinaryIO, TextIO, cast

from vsh.address import Address
from vsh.errors import ConnectionLost, UsageError, VshError
from vsh.subsystem import open_subsystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.registry import Entry

# draft-ietf-secsh-filexfer-02
_INIT, _VERSION, _OPEN, _CLOSE, _READ, _WRITE, _FSTAT, _FSETSTAT = 1, 2, 3, 4, 5, 6, 8, 10
_STATUS, _HANDLE, _DATA, _ATTRS = 101, 102, 103, 105
_OK, _EOF, _NO_SUCH_FILE, _PERMISSION_DENIED = 0, 1, 2, 3
_FOR_READING, _FOR_WRITING, _APPENDING, _CREATING, _TRUNCATING, _EXCLUSIVE = 1, 2, 4, 8, 16, 32
_HAS_SIZE = 1
_PACKET_MAX = 1 << 18
# What vshd reads and writes at once (protocol.md, 6.2). It sends so much without a copy.
CHUNK_SIZE = (1 << 18) - 1024
_HANDLE_MAX = 256
# A guest with a slow disk takes long to write; one that is gone answers never.
ANSWER_TIMEOUT_S = 120.0
_MODES = {
    "r": _FOR_READING,
    "w": _FOR_WRITING | _CREATING | _TRUNCATING,
    "x": _FOR_WRITING | _CREATING | _EXCLUSIVE,
    "a": _FOR_WRITING | _CREATING | _APPENDING,
}
_NUMBERS = {os.strerror(number): number for number in errno.errorcode}
_CODES = {_NO_SUCH_FILE: errno.ENOENT, _PERMISSION_DENIED: errno.EACCES}


def open_file(
    address: Address,
    path: str | bytes,
    mode: str,
    *,
    user: str,
    encoding: str | None,
    errors: str | None,
    newline: str | None,
    timeout_s: float,
) -> BinaryIO | TextIO:
    """Opens a guest's file; see Client.open. Raises OSError for the file, UsageError, VshError."""
    flags = parse_mode(mode, is_text=encoding is not None)
    sock = open_subsystem(address, "sftp", user=user, timeout_s=timeout_s)
    try:
        sock.settimeout(ANSWER_TIMEOUT_S)
        raw = RemoteFile(_Requests(sock, address.entry), os.fsencode(path), flags)
    except BaseException:
        sock.close()
        raise
    stream: io.RawIOBase = raw
    buffered: io.BufferedRandom | io.BufferedReader | io.BufferedWriter
    if raw.readable() and raw.writable():
        buffered = io.BufferedRandom(stream, CHUNK_SIZE)
    elif raw.readable():
        buffered = io.BufferedReader(stream, CHUNK_SIZE)
    else:
        buffered = io.BufferedWriter(stream, CHUNK_SIZE)
    if encoding is None:
        return cast(BinaryIO, buffered)
    try:
        return io.TextIOWrapper(buffered, encoding, errors, newline)
    except (LookupError, ValueError):
        buffered.close()
        raise


def parse_mode(mode: str, *, is_text: bool) -> int:
    """Returns the flags of an OPEN. Raises UsageError."""
    kind = mode.replace("b", "", 1).replace("+", "", 1)
    if kind not in _MODES:
        raise UsageError(
            f"open() has no mode {mode!r}", hint="the modes are r, w, x and a, with + and b; text needs encoding"
        )
    if is_text and "b" in mode:
        raise UsageError(f"open() takes no encoding with the mode {mode!r}", hint="leave out the b")
    return _MODES[kind] | (_FOR_READING | _FOR_WRITING if "+" in mode else 0)


class _Requests:
    """One request at a time. Invariant: between two calls no answer is under way."""

    def __init__(self, sock: socket.socket, machine: "Entry | None" = None) -> None:
        """machine: whose end is the cause where the connection is lost."""
        self._sock = sock
        self._machine = machine
        self._ident = 0
        self._send(struct.pack(">BI", _INIT, 3), b"")
        kind, _ = self._receive()
        if kind != _VERSION:
            raise VshError("the guest's SFTP server did not greet")

    def ask(self, kind: int, body: bytes, data: "bytes | memoryview" = b"") -> tuple[int, memoryview]:
        """Returns the kind and the fields of the answer. Raises ConnectionLost, VshError."""
        self._ident = (self._ident + 1) % (1 << 32)
        self._send(struct.pack(">BI", kind, self._ident) + body, data)
        answer, fields = self._receive()
        if len(fields) < 4 or int.from_bytes(fields[:4], "big") != self._ident:
            raise VshError("the guest's SFTP server answered a request that vsh did not send")
        return answer, fields[4:]

    def close(self) -> None:
        """Closes the connection."""
        self._sock.close()

    def _send(self, head: bytes, data: "bytes | memoryview") -> None:
        try:
            self._sock.sendall(struct.pack(">I", len(head) + len(data)) + head)
            if data:
                self._sock.sendall(data)
        except OSError as error:
            raise self._lose(_describe(error)) from error

    def _receive(self) -> tuple[int, memoryview]:
        size = int.from_bytes(self._take(4), "big")
        if not 0 < size <= _PACKET_MAX:
            raise VshError(f"the guest's SFTP server sent a packet of {size} bytes")
        packet = self._take(size)
        return packet[0], packet[1:]

    def _take(self, size: int) -> memoryview:
        whole = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            try:
                count = self._sock.recv_into(whole[filled:])
            except OSError as error:
                raise self._lose(_describe(error)) from error
            if not count:
                raise self._lose("the guest ended the connection of an open file")
            filled += count
        return whole

    def _lose(self, brief: str) -> ConnectionLost:
        from vsh.ending import explain_loss  # noqa: PLC0415 - only after a failure

        lost = ConnectionLost(brief)
        explain_loss(lost, self._machine)
        return lost


class RemoteFile(io.RawIOBase):
    """An open file of a guest, unbuffered. Invariant: `_handle` is open in the guest until close()."""

    def __init__(self, requests: _Requests, path: bytes, flags: int) -> None:
        """Raises OSError, VshError."""
        self._path = path
        self._flags = flags
        self._requests = requests
        self._offset = 0
        self._is_broken = False
        # close() runs also when the file could not be opened.
        self._handle = b""
        body = _pack(path) + struct.pack(">II", flags, 0)
        handle = _read_text(self._ask(_OPEN, _HANDLE, body))
        if not 0 < len(handle) <= _HANDLE_MAX:
            raise VshError(f"the guest's SFTP server sent a handle of {len(handle)} bytes")
        self._handle = _pack(bytes(handle))
        if flags & _APPENDING:
            self._offset = self._find_size()

    @property
    def name(self) -> str:
        """The path in the guest."""
        return os.fsdecode(self._path)

    def readable(self) -> bool:
        return bool(self._flags & _FOR_READING)

    def writable(self) -> bool:
        return bool(self._flags & _FOR_WRITING)

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # collections.abc.Buffer is of Python 3.12
        view = memoryview(buffer).cast("B")
        data = self._read(min(len(view), CHUNK_SIZE))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        pieces = []
        while data := self._read(CHUNK_SIZE):
            pieces.append(data)
        return b"".join(pieces)

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]  # collections.abc.Buffer is of Python 3.12
        self._check("write", self.writable())
        piece = memoryview(data).cast("B")[:CHUNK_SIZE]
        body = self._handle + struct.pack(">QI", self._offset, len(piece))
        self._ask(_WRITE, _STATUS, body, piece)
        self._offset += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check("seek", True)
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset}.get(whence)
        if start is None:
            if whence != os.SEEK_END:
                raise ValueError(f"seek() takes 0, 1 or 2, not {whence}")
            start = self._find_size()
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._offset = start + offset
        return self._offset

    def tell(self) -> int:
        self._check("tell", True)
        return self._offset

    def truncate(self, size: int | None = None) -> int:
        self._check("truncate", self.writable())
        wanted = self._offset if size is None else size
        self._ask(_FSETSTAT, _STATUS, self._handle + struct.pack(">IQ", _HAS_SIZE, wanted))
        return wanted

    def close(self) -> None:
        if self.closed:
            return
        handle, self._handle = self._handle, b""
        try:
            super().close()
            if handle and not self._is_broken:
                # What was written may not have reached the disk, and only now it shows.
                self._ask(_CLOSE, _STATUS, handle)
        finally:
            self._requests.close()

    def _read(self, size: int) -> memoryview:
        self._check("read", self.readable())
        if not size:
            return memoryview(b"")
        body = self._handle + struct.pack(">QI", self._offset, size)
        try:
            data = _read_text(self._ask(_READ, _DATA, body))
        except EOFError:
            return memoryview(b"")
        if not 0 < len(data) <= size:
            self._is_broken = True
            raise VshError(f"the guest's SFTP server sent {len(data)} bytes for a read of {size} bytes")
        self._offset += len(data)
        return data

    def _find_size(self) -> int:
        fields = self._ask(_FSTAT, _ATTRS, self._handle)
        if len(fields) < 12 or not int.from_bytes(fields[:4], "big") & _HAS_SIZE:
            raise VshError("the guest's SFTP server sent no size")
        return int.from_bytes(fields[4:12], "big")

    def _check(self, call: str, is_possible: bool) -> None:
        if self.closed:
            raise ValueError(f"{call}() of a closed file")
        if not is_possible:
            raise io.UnsupportedOperation(call)

    def _ask(self, kind: int, wanted: int, body: bytes, data: "bytes | memoryview" = b"") -> memoryview:
        """Returns the fields of the answer. Raises OSError, EOFError for the end of the file, VshError."""
        try:
            answer, fields = self._requests.ask(kind, body, data)
        except VshError:
            # The program has the error; close() has nothing to add, also when the file is only dropped.
            self._is_broken = True
            raise
        if answer == _STATUS and len(fields) >= 4:
            code = int.from_bytes(fields[:4], "big")
            if code == _EOF and kind == _READ:
                raise EOFError
            if code != _OK:
                raise self._refuse(code, fields[4:])
        if answer != wanted:
            raise VshError(f"the guest's SFTP server answered request {kind} with packet {answer}")
        return fields

    def _refuse(self, code: int, fields: memoryview) -> OSError:
        text = bytes(_read_text(fields)[:200]).decode(errors="replace") if len(fields) >= 4 else ""
        number = _NUMBERS.get(text) or _CODES.get(code, errno.EIO)
        return OSError(number, os.strerror(number), self.name)


def _pack(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def _read_text(fields: memoryview) -> memoryview:
    size = int.from_bytes(fields[:4], "big")
    if len(fields) < 4 or size > len(fields) - 4:
        raise VshError("the guest's SFTP server sent a packet that is too short")
    return fields[4 : 4 + size]


def _describe(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"the guest did not answer for {ANSWER_TIMEOUT_S:g} s about an open file"
    return f"the connection of an open file broke: {error.strerror}"
