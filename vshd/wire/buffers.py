"""What a driver receives into: a buffer that grows with what comes, and a second one while the first is still wanted.

Every page of a buffer costs a short session a fault in the kernel, so the first is small. What a slow reader has not
taken stays where it is, instead of being copied, as long as there is another buffer to receive into.
"""

FIRST_SIZE = 1 << 13
# More than a default socket buffer holds: one read empties it.
BULK_SIZE = 1 << 18


class Buffers:
    """Invariant: `current` is free; the held one, if any, must not be written to until release()."""

    __slots__ = ("_held", "_spare", "current")

    def __init__(self) -> None:
        self.current = memoryview(bytearray(FIRST_SIZE))
        self._held: memoryview | None = None
        self._spare: memoryview | None = None

    def received(self, size: int) -> None:
        """The last receive brought so much, and its data is gone or held: a filled one is followed by a large one."""
        if size == FIRST_SIZE == len(self.current):
            self.current = memoryview(bytearray(BULK_SIZE))

    def hold(self) -> bool:
        """Keeps the current buffer's data where it is; False when there is no other buffer, and it must be copied."""
        if self._held is not None:
            return False
        self._held = self.current
        spare, self._spare = self._spare, None
        if spare is None or len(spare) < len(self._held):
            spare = memoryview(bytearray(len(self._held)))
        self.current = spare
        return True

    def release(self) -> None:
        """Nothing in the held buffer is wanted any more."""
        if self._held is not None:
            self._spare, self._held = self._held, None
