"""Bytes waiting for a descriptor, as a list of buffers that can be written at once."""

# More buffers than this in one writev() buy nothing, and Linux takes at most 1024.
BUFFERS_AT_ONCE = 64


class Output:
    """Bytes to write, in order. Referenced, not copied: their owner must not change them before they are gone."""

    __slots__ = ("_buffers", "size")

    def __init__(self) -> None:
        self._buffers: list[memoryview | bytes] = []
        self.size = 0

    def append(self, data: memoryview | bytes) -> None:
        self._buffers.append(data)
        self.size += len(data)

    def clear(self) -> None:
        self._buffers.clear()
        self.size = 0

    def buffers(self) -> "list[memoryview | bytes]":
        """What to give to writev() next."""
        return self._buffers[:BUFFERS_AT_ONCE]

    def sent(self, size: int) -> None:
        """The first `size` bytes are gone."""
        self.size -= size
        if self.size == 0:
            self._buffers.clear()
            return
        whole = 0
        for buffer in self._buffers:
            if size < len(buffer):
                break
            size -= len(buffer)
            whole += 1
        del self._buffers[:whole]
        if size:
            self._buffers[0] = memoryview(self._buffers[0])[size:]

    def keep(self) -> None:
        """Makes what waits our own, before its owner changes it: the views at the end, as one piece."""
        first = len(self._buffers)
        while first and isinstance(self._buffers[first - 1], memoryview) and not self._is_ours(first - 1):
            first -= 1
        if first < len(self._buffers):
            self._buffers[first:] = [b"".join(self._buffers[first:])]

    def _is_ours(self, index: int) -> bool:
        """A view of bytes, which nobody can change."""
        buffer = self._buffers[index]
        return isinstance(buffer, memoryview) and isinstance(buffer.obj, bytes)

    def take(self) -> bytes:
        """Everything at once, for tests and other drivers without sendmsg()."""
        data = b"".join(self._buffers)
        self.sent(len(data))
        return data
