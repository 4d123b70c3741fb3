"""A container's standard streams on one connection: reads the engine's framing, or the terminal's raw bytes.

The framing is the Engine API's (ContainerAttach). Without a tty, each piece has a header of 8 bytes: the stream's
number, three zeroes, the length (32 bits, big-endian).
"""

import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from vsh.stdio import HELD_LOOK_S, is_background
from vsh.terminal import RawTerminal, find_size

HEADER = struct.Struct(">BxxxL")
READ_BYTES = 1 << 16
STDERR = 2


class Demux:
    """Splits pieces of the connection into (stream number, data). Holds at most a header, never the data."""

    def __init__(self) -> None:
        self._header = b""
        self._stream = 0
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                yield self._stream, piece
                continue
            need = HEADER.size - len(self._header)
            self._header, data = self._header + data[:need], data[need:]
            if len(self._header) == HEADER.size:
                self._stream, self._left = HEADER.unpack(self._header)
                self._header = b""


def write_here(stream: int, data: bytes) -> None:
    """Writes to our own stdout or stderr at once."""
    target = sys.stderr if stream == STDERR else sys.stdout
    target.flush()
    target.buffer.write(data)
    target.buffer.flush()


class Terminal:
    """Gives our terminal to a container for a block: raw, with its size sent at the start and at each change."""

    def __init__(self, tell_size: Callable[[int, int], None]) -> None:
        self._raw = RawTerminal(0)
        self._tell_size = tell_size

    def __enter__(self) -> "Terminal":
        signal.signal(signal.SIGWINCH, self._changed)
        self.take()
        self._changed(0, None)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
        self._raw.leave()

    def take(self) -> bool:
        """Makes the terminal raw; False while another job has it. Call this before each read, and after `look_s`."""
        return self._raw.enter()

    @property
    def look_s(self) -> float | None:
        return self._raw.look_s

    def _changed(self, _number: int, _frame: FrameType | None) -> None:
        rows, columns = find_size()
        if rows:
            self._tell_size(rows, columns)


def pump(
    connection: socket.socket, *, terminal: Terminal | None, stdin: int | None, write: Callable[[int, bytes], None]
) -> None:
    """Copies until the container's output ends. stdin: a descriptor whose bytes it sends, or None to send nothing.

    Without stdin the sending half stays open. Its end would make the container end its command.
    """
    demux = Demux() if terminal is None else None
    while True:
        is_held = stdin is not None and _is_held(stdin, terminal)
        sources: list[socket.socket | int] = [connection] if stdin is None or is_held else [connection, stdin]
        look_s = HELD_LOOK_S if is_held else None
        readable, _, _ = select.select(sources, [], [], look_s if terminal is None else terminal.look_s)
        if connection in readable:
            data = connection.recv(READ_BYTES)
            if not data:
                return
            for stream, piece in [(1, data)] if demux is None else demux.feed(data):
                write(stream, piece)
        if stdin is not None and stdin in readable and not _is_held(stdin, terminal):
            typed = os.read(stdin, READ_BYTES)
            if typed:
                connection.sendall(typed)
            else:
                connection.shutdown(socket.SHUT_WR)
                stdin = None


def _is_held(stdin: int, terminal: Terminal | None) -> bool:
    """Whether stdin is a terminal that belongs to another job, and so must not be read."""
    return is_background(stdin) if terminal is None else not terminal.take()
