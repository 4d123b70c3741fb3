"""A command's output as it comes: its end, for a person, and the test results in it."""

from vmkit.ktap.parser import KtapParser
from vmkit.ktap.results import KtapResult
from vsh.pump import Sink


class Tail:
    """The end of what several streams wrote. Invariant: `_data` has at most twice the limit."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._data = bytearray()

    def add(self, data: bytes | memoryview) -> None:
        self._data += data
        if len(self._data) > 2 * self._limit_bytes:
            del self._data[: -self._limit_bytes]

    def read(self) -> bytes:
        return bytes(self._data[-self._limit_bytes :])


class TailSink(Sink):
    """Keeps the end of a stream."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail

    def write(self, pieces: list[memoryview | bytes]) -> int:
        for piece in pieces:
            self._tail.add(piece)
        return sum(map(len, pieces))


class KtapSink(TailSink):
    """Reads the test results of a stream, too. They are there however the stream ends."""

    def __init__(self, tail: Tail) -> None:
        super().__init__(tail)
        self._parser = KtapParser()
        self._results: list[KtapResult] = []

    def write(self, pieces: list[memoryview | bytes]) -> int:
        for piece in pieces:
            self._results += self._parser.receive_data(bytes(piece))
        return super().write(pieces)

    @property
    def has_found(self) -> bool:
        """Whether there are test results."""
        return self._parser.has_found

    def finish(self, cause: str = "") -> tuple[KtapResult, ...]:
        """Returns all results, with those that are missing. cause: why the output ended, if not by itself."""
        self._results += self._parser.receive_end(cause)
        return tuple(self._results)
