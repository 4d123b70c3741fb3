"""Standard input as a source and standard output as a destination."""

import os
import time
from collections.abc import Sequence

from vmkit.copy.engine import Arrival, Step
from vmkit.copy.interruption import LetSignals
from vmkit.copy.items import FileError, FileWriter, Item, ItemKind, Piece, SinkFolder
from vmkit.copy.wire import CHUNK_BYTES_MAX

STDIN = 0
STDOUT = 1


class StreamReader:
    """Reads a stream in order, until its end. It blocks, and the copy has nothing else to do meanwhile."""

    pending = 0

    def __init__(self, fd: int, chunk_bytes: int) -> None:
        now_ns = time.time_ns()
        mask = os.umask(0)
        os.umask(mask)
        self.item = Item(ItemKind.FILE, 0, 0o666 & ~mask, now_ns, now_ns)
        self.can_ask = True
        self.end = 0
        self._fd = fd
        self._chunk_bytes = chunk_bytes
        self._arrived: list[tuple[int, Piece]] = []

    def has_room(self) -> bool:
        return True

    def ask(self) -> None:
        with LetSignals():
            data = os.read(self._fd, self._chunk_bytes)
        self.can_ask = bool(data)
        if data:
            self._arrived.append((self.end, data))
            self.end += len(data)

    def take(self) -> Sequence[tuple[int, Piece]]:
        arrived, self._arrived = self._arrived, []
        return arrived

    def receive(self, arrival: Arrival) -> bool:
        return False

    def finish(self) -> Step[None]:
        yield from ()

    def close(self) -> Step[None]:
        yield from ()


class StreamFolder:
    """Standard output in the place of a directory, for one file."""

    chunk_bytes = CHUNK_BYTES_MAX

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def describe(self, name: bytes) -> str:
        return "standard output"

    def make_folder(self, name: bytes) -> Step[tuple[SinkFolder, bool]]:
        yield from ()
        raise FileError("a directory cannot go to standard output")

    def open_writer(self, name: bytes, item: Item) -> Step[FileWriter]:
        yield from ()
        return StreamWriter(self._fd)

    def write_whole(self, name: bytes, item: Item, data: Piece) -> Step[bool]:
        yield from ()
        return False

    def make_link(self, name: bytes, target: bytes, item: Item) -> Step[None]:
        yield from ()
        raise FileError("a symbolic link that leads nowhere cannot go to standard output")

    def locate(self, name: bytes) -> bytes:
        return name

    def make_hard_link(self, name: bytes, first: bytes) -> Step[bool]:
        yield from ()
        return False

    def finish(self, item: Item) -> Step[None]:
        yield from ()

    def close(self) -> Step[None]:
        yield from ()


class StreamWriter:
    """Writes data in order. Data that comes too early waits; there is never more of it than the window lets come."""

    pending = 0

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._next = 0
        self._early: dict[int, Piece] = {}

    def has_room(self) -> bool:
        # While one reply is late, the rest must not pile up here.
        return not self._early

    def put(self, offset: int, data: Piece) -> None:
        self._early[offset] = data
        while (piece := self._early.pop(self._next, None)) is not None:
            view = memoryview(piece)
            while view:
                with LetSignals():
                    count = os.write(self._fd, view)
                view = view[count:]
            self._next += len(piece)

    def receive(self, arrival: Arrival) -> None:
        pass

    def finish(self, item: Item, size: int) -> Step[None]:
        yield from ()
        if self._early or self._next != size:
            raise FileError("the guest sent data that does not fit together")

    def drop(self) -> Step[None]:
        yield from ()
