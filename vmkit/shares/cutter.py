"""Cuts what a guest sends into messages, in one buffer. Does no I/O."""

from abc import ABC, abstractmethod


class ProtocolError(Exception):
    """The guest sent no message of its protocol. It is not the kernel that speaks."""


class MountFailedError(Exception):
    """The guest's vshd could not mount the folder."""


class Cutter(ABC):
    """Invariant: bytes from `_start` to `_end` are not taken yet; one whole message has room."""

    def __init__(self, head_size: int, message_max: int) -> None:
        self._head_size = head_size
        self._message_max = message_max
        self._buffer = memoryview(bytearray(2 * message_max))
        self._start = self._end = 0

    @abstractmethod
    def read_length(self, head: memoryview) -> int:
        """The length of the message that begins with `head`, itself included. Raises ProtocolError."""

    def find_room(self) -> memoryview:
        """Where the next bytes go. Messages that were taken are not valid any more."""
        waiting = self._end - self._start
        if not waiting:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < self._message_max:
            # Through a copy: the two places may overlap.
            self._buffer[:waiting] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, waiting
        return self._buffer[self._end :]

    def received(self, size: int) -> None:
        """So many bytes are there now."""
        self._end += size

    def take(self) -> memoryview | None:
        """The next message that is whole; None where there is none. Raises ProtocolError."""
        waiting = self._end - self._start
        if waiting < self._head_size:
            return None
        length = self.read_length(self._buffer[self._start : self._start + self._head_size])
        if not self._head_size <= length <= self._message_max:
            raise ProtocolError(f"a message has {length} bytes")
        if waiting < length:
            return None
        message = self._buffer[self._start : self._start + length]
        self._start += length
        return message
