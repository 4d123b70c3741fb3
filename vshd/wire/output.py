"""Bytes waiting for a descriptor, as a list of buffers that can be written at once."""

# More buffers than this in one writev() buy nothing, and Linux takes at most 1024.
BUFFERS_AT_ONCE = 64


class Output:
    """Bytes to write, in order. Referenced, not copied: their owner must not change them before they are gone.

    Invariant: `is_borrowing` is set while anything that waits is a view of a buffer that can change.
    """

    __slots__ = ("_buffers", "is_borrowing", "size")

    def __init__(self) -> None:
        self._buffers: list[memoryview | bytes] = []
        self.size = 0
        self.is_borrowing = False

    def append(self, data: memoryview | bytes) -> None:
        self._buffers.append(data)
        self.size += len(data)
        self.is_borrowing = self.is_borrowing or not _is_fixed(data)

    def clear(self) -> None:
        self._buffers.clear()
        self.size = 0
        self.is_borrowing = False

    def buffers(self) -> "list[memoryview | bytes]":
        """What to give to writev() next."""
        return self._buffers[:BUFFERS_AT_ONCE]

    def sent(self, size: int) -> None:
        """The first `size` bytes are gone."""
        if size == self.size:
            self.clear()
            return
        self.size -= size
        whole = 0
        for buffer in self._buffers:
            if size < len(buffer):
                break
            size -= len(buffer)
            whole += 1
        del self._buffers[:whole]
        if size:
            self._buffers[0] = memoryview(self._buffers[0])[size:]

    def borrowed(self) -> "list[object]":
        """The owners of what waits and can change."""
        return [buffer.obj for buffer in self._buffers if isinstance(buffer, memoryview) and not _is_fixed(buffer)]

    def keep(self) -> None:
        """Makes what waits our own, in one piece from the first borrowed view on."""
        for index, buffer in enumerate(self._buffers):
            if not _is_fixed(buffer):
                self._buffers[index:] = [b"".join(self._buffers[index:])]
                break
        self.is_borrowing = False

    def take(self) -> bytes:
        """Everything at once, for tests and other drivers without writev()."""
        data = b"".join(self._buffers)
        self.clear()
        return data


def _is_fixed(data: memoryview | bytes) -> bool:
    """Bytes or a view of bytes, which nobody can change."""
    return isinstance(data, bytes) or isinstance(data.obj, bytes)
