"""A source that sends bytes, and a sink that keeps its bytes: for programs that use a target."""

from vsh.errors import VshError
from vsh.pump import Sink, Source


class BytesSource(Source):
    """Gives out `data`, then the end."""

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def read(self, limit: int) -> memoryview:
        piece, self._rest = self._rest[:limit], self._rest[limit:]
        return piece


class CaptureSink(Sink):
    """Keeps everything, up to a limit of its own. Invariant: at most limit_bytes are kept."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, pieces: list[memoryview | bytes]) -> int:
        size = sum(map(len, pieces))
        self._size += size
        if self._size > self._limit_bytes:
            raise VshError(
                f"the command wrote more than {self._limit_bytes} bytes", hint="raise output_limit_bytes, or stream it"
            )
        self._pieces += map(bytes, pieces)
        return size

    def take(self) -> bytes:
        return b"".join(self._pieces)


class NullSink(Sink):
    """Throws everything away."""

    def write(self, pieces: list[memoryview | bytes]) -> int:
        return sum(map(len, pieces))
