"""Bytes waiting for a descriptor, as a list of buffers that can be written at once."""

# More buffers than this in one writev() buy nothing, and Linux takes at most 1024.
BUFFERS_AT_ONCE = 64


class Elsewhere:
    """The turn of some bytes that wait in a place of the driver's: only their number is known here."""

    __slots__ = ("place", "size")

    def __init__(self, place: object, size: int) -> None:
        self.place = place
        self.size = size

    def __len__(self) -> int:
        return self.size


class Output:
    """Bytes to write, in order. Referenced, not copied: their owner must not change them before they are gone.

    Invariant: `is_borrowing` is set while anything that waits is a view of a buffer that can change; `_elsewhere` of
    the entries are Elsewhere.
    """

    __slots__ = ("_buffers", "_elsewhere", "is_borrowing", "size")

    def __init__(self) -> None:
        self._buffers: list[memoryview | bytes | Elsewhere] = []
        self._elsewhere = 0
        self.size = 0
        self.is_borrowing = False

    def append(self, data: memoryview | bytes) -> None:
        self._buffers.append(data)
        self.size += len(data)
        self.is_borrowing = self.is_borrowing or not _is_fixed(data)

    def append_elsewhere(self, place: object, size: int) -> None:
        """The next `size` bytes are those that were put into `place` last."""
        last = self._buffers[-1] if self._buffers else None
        if isinstance(last, Elsewhere) and last.place is place:
            last.size += size
        else:
            self._buffers.append(Elsewhere(place, size))
            self._elsewhere += 1
        self.size += size

    def clear(self) -> None:
        """Forgets what waits; what is elsewhere stays there, for its owner to drop."""
        self._buffers.clear()
        self._elsewhere = 0
        self.size = 0
        self.is_borrowing = False

    @property
    def elsewhere(self) -> Elsewhere | None:
        """What to write next, when that is not here; buffers() then has nothing."""
        first = self._buffers[0] if self._elsewhere else None
        return first if isinstance(first, Elsewhere) else None

    def bring(self, data: bytes) -> None:
        """What was elsewhere and next is here now."""
        self._buffers[0] = data
        self._elsewhere -= 1

    def buffers(self) -> "list[memoryview | bytes]":
        """What to give to writev() next: all before the first that is elsewhere."""
        if not self._elsewhere:
            return self._buffers[:BUFFERS_AT_ONCE]  # type: ignore[return-value]  # none is Elsewhere
        buffers: list[memoryview | bytes] = []
        for buffer in self._buffers[:BUFFERS_AT_ONCE]:
            if isinstance(buffer, Elsewhere):
                break
            buffers.append(buffer)
        return buffers

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
            self._elsewhere -= isinstance(buffer, Elsewhere)
        del self._buffers[:whole]
        if size:
            first = self._buffers[0]
            if isinstance(first, Elsewhere):
                first.size -= size
            else:
                self._buffers[0] = memoryview(first)[size:]

    def borrowed(self) -> "list[object]":
        """The owners of what waits and can change."""
        return [buffer.obj for buffer in self._buffers if isinstance(buffer, memoryview) and not _is_fixed(buffer)]

    def keep(self) -> None:
        """Makes what waits our own: in one piece from the first borrowed view on, as far as it is here."""
        kept: list[memoryview | bytes | Elsewhere] = []
        run: list[memoryview | bytes] = []
        for buffer in self._buffers:
            if isinstance(buffer, Elsewhere):
                kept += [b"".join(run)] if run else []
                kept.append(buffer)
                run = []
            elif run or not _is_fixed(buffer):
                run.append(buffer)
            else:
                kept.append(buffer)
        self._buffers = kept + ([b"".join(run)] if run else [])
        self.is_borrowing = False

    def join(self) -> None:
        """Makes one buffer of very many, unless some of it is elsewhere or borrowed."""
        if len(self._buffers) > BUFFERS_AT_ONCE and not self._elsewhere and not self.is_borrowing:
            self._buffers = [b"".join(self._buffers)]  # type: ignore[arg-type]  # none is Elsewhere

    def take(self) -> bytes:
        """Everything at once, for tests and other drivers without writev(); nothing may be elsewhere."""
        data = b"".join(self._buffers)  # type: ignore[arg-type]  # none is Elsewhere
        self.clear()
        return data


def _is_fixed(data: memoryview | bytes) -> bool:
    """Bytes or a view of bytes, which must not change."""
    return isinstance(data, bytes) or isinstance(data.obj, bytes)
