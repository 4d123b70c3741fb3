"""The receive buffers of a driver: one that grows with the data, and others while the first ones are still in use.

Every page of a buffer costs a short session a fault in the kernel, so the first is small. Data that a slow reader has
not taken stays in its buffer, as long as there is another buffer to receive into. A copy of bulk costs more than all
other work on it.
"""

from vshd.wire.output import Output

FIRST_SIZE = 1 << 13
# More than a default socket buffer holds: one read empties it.
BULK_SIZE = 1 << 18
# A window of bulk (vshd.wire.connection).
HELD_MAX = 4


class Buffers:
    """Invariant: `current` is free; the held ones must not be written to while a reader borrows them."""

    __slots__ = ("_held", "_spares", "current")

    def __init__(self) -> None:
        self.current = memoryview(bytearray(FIRST_SIZE))
        self._held: list[memoryview] = []
        self._spares: list[memoryview] = []

    def received(self, size: int) -> None:
        """The last receive brought so much, and its data is gone or held: a filled one is followed by a large one."""
        if size == FIRST_SIZE == len(self.current):
            self.current = memoryview(bytearray(BULK_SIZE))

    def secure(self, *waiting: Output) -> None:
        """What still waits of the last receives survives the next: in its buffer, or as a copy where there are many."""
        wanted = {id(owner) for output in waiting for owner in output.borrowed()}
        self._spares += [buffer for buffer in self._held if id(buffer.obj) not in wanted]
        self._held = [buffer for buffer in self._held if id(buffer.obj) in wanted]
        if id(self.current.obj) not in wanted:
            return
        if len(self._held) == HELD_MAX:
            for output in waiting:
                output.keep()
            self._spares += self._held
            self._held = []
            return
        self._held.append(self.current)
        size = len(self.current)
        self._spares = [spare for spare in self._spares if len(spare) >= size]
        self.current = self._spares.pop() if self._spares else memoryview(bytearray(size))
