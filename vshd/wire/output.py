"""Frames waiting for the socket, as a list of buffers that can be written at once."""

# More buffers than this in one sendmsg() buy nothing, and Linux refuses 1024.
BUFFERS_AT_ONCE = 64


class Output:
    """Bytes to send, in order. Data is referenced, not copied: its owner must not change it before it is sent."""

    __slots__ = ("_buffers", "size")

    def __init__(self) -> None:
        self._buffers: list[memoryview | bytes] = []
        self.size = 0

    def append(self, data: memoryview | bytes) -> None:
        self._buffers.append(data)
        self.size += len(data)

    def buffers(self) -> "list[memoryview | bytes]":
        """What to give to sendmsg() next."""
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

    def take(self) -> bytes:
        """Everything at once, for tests and other drivers without sendmsg()."""
        data = b"".join(self._buffers)
        self.sent(len(data))
        return data
