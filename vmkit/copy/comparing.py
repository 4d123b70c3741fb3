"""Whether two files have the same data: both are read whole, and their digests are compared."""

import hashlib

from vmkit.copy.engine import Arrival, Step
from vmkit.copy.host_source import HostReader
from vmkit.copy.items import CHANGED, FileError, FileReader, Item, Piece
from vmkit.copy.tree import Tally, pump

HOLE = bytes(1 << 20)


class Digest:
    """Takes data as a writer does, and keeps its digest alone. Invariant: `_next` bytes are in the digest.

    has_holes: the data comes in order, and what is left out is zeros. Without it, data that comes too early waits;
    there is never more of it than the window lets come.
    """

    pending = 0

    def __init__(self, *, has_holes: bool) -> None:
        self._has_holes = has_holes
        self._hash = hashlib.sha256()
        self._next = 0
        self._early: dict[int, Piece] = {}

    def has_room(self) -> bool:
        return not self._early

    def put(self, offset: int, data: Piece) -> None:
        if self._has_holes:
            self._skip(offset)
        self._early[offset] = data
        while (piece := self._early.pop(self._next, None)) is not None:
            self._hash.update(piece)
            self._next += len(piece)

    def receive(self, arrival: Arrival) -> None:
        pass

    def finish(self, item: Item, size: int) -> Step[None]:
        yield from ()
        if self._has_holes:
            self._skip(size)
        if self._early or self._next != size:
            raise FileError(CHANGED)

    def drop(self) -> Step[None]:
        yield from ()

    def read(self) -> bytes:
        """Returns the digest of the data so far."""
        return self._hash.digest()

    def _skip(self, end: int) -> None:
        while self._next < end:
            count = min(len(HOLE), end - self._next)
            self._hash.update(memoryview(HOLE)[:count])
            self._next += count


def find_digest(reader: FileReader) -> Step[bytes]:
    """Reads an open file to its end. Raises FileError, and closes the file in any case."""
    digest = Digest(has_holes=isinstance(reader, HostReader))
    try:
        # Nothing arrives at a destination, so the progress does not count it.
        yield from pump(reader, digest, Tally())
        yield from reader.finish()
        yield from digest.finish(reader.item, reader.end)
    except FileError:
        yield from reader.close()
        raise
    return digest.read()
