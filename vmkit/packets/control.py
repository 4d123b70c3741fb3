"""A program's end of a device's control socket: sends requests, reads answers and the records of a trace."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmkit.errors import MachineError
from vmkit.vsock.records import Captured, RecordReader, TraceError
from vmkit.vsock.requests import Fault, ReadRecent, Request, RequestError, TraceRequest, parse_request, render_request

ANSWER_DEADLINE_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 64 * 1024
_READ_BYTES: Final = 256 * 1024


class DeviceControl:
    """A connection to a device's control socket. Invariant: `_rest` was received and not used yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = bytearray()

    def ask(self, request: Request) -> list[bytes]:
        """The lines that answer a request. Raises MachineError when the device refuses it or does not answer."""
        self._sock.settimeout(ANSWER_DEADLINE_S)
        try:
            self._sock.sendall(render_request(request))
            word, _, rest = self._read_line().partition(b" ")
            if word == b"ok" and rest.isdigit():
                return [self._read_line() for _ in range(int(rest))]
        except OSError as error:
            raise MachineError(f"the vsock device does not answer: {error.strerror or error}") from error
        if word == b"error":
            raise MachineError(f"the vsock device refused: {rest.decode(errors='backslashreplace')}")
        raise MachineError("the vsock device sent an answer that vmkit does not know")

    def ask_faults(self, request: Request) -> list[Fault]:
        """The faults that answer a request."""
        faults = []
        for line in self.ask(request):
            try:
                fault = parse_request(line)
            except RequestError as error:
                raise MachineError(f"the vsock device sent an answer that vmkit does not know: {error}") from error
            if isinstance(fault, Fault):
                faults.append(fault)
        return faults

    def ask_recent(self) -> list[Captured]:
        """The packets that the device keeps, the oldest first. Raises MachineError."""
        try:
            return list(RecordReader(0).feed(b"".join(bytes.fromhex(line.decode()) for line in self.ask(ReadRecent()))))
        except (ValueError, TraceError) as error:
            raise MachineError(f"the vsock device sent an answer that vmkit does not know: {error}") from error

    def follow(self, trace: TraceRequest) -> Iterator[Captured]:
        """Begins a trace at once; the iterator yields packets until the device ends. Raises MachineError."""
        self.ask(trace)
        self._sock.settimeout(None)
        return self._read_packets(RecordReader(trace.snaplen))

    def _read_packets(self, reader: RecordReader) -> Iterator[Captured]:
        data = bytes(self._rest)
        try:
            while True:
                yield from reader.feed(data)
                data = self._sock.recv(_READ_BYTES)
                if not data:
                    return
        except TraceError as error:
            raise MachineError(str(error)) from error
        except ConnectionResetError:
            return

    def _read_line(self) -> bytes:
        while (end := self._rest.find(b"\n")) < 0:
            data = self._sock.recv(4096)
            if not data or len(self._rest) > MAX_ANSWER_BYTES:
                raise ConnectionResetError("it closed the connection")
            self._rest += data
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line


@contextlib.contextmanager
def open_control(path: Path) -> Iterator[DeviceControl]:
    """A connection to the control socket at `path`. Raises MachineError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_DEADLINE_S)
        try:
            sock.connect(str(path))
        except OSError as error:
            raise MachineError(f"the vsock device does not answer at {path}: {error.strerror or error}") from error
        yield DeviceControl(sock)
