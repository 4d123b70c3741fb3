"""Frames: a length in front of every payload (docs/reference/protocol.md 1.1).

Owns the length prefix and its limit. A payload that is plainly one DataMessage, as every known peer writes them, is
handed on in pieces as it arrives: bulk data is never collected or copied here. Every other payload is collected, which
the limit bounds, and handed on whole.
"""

from vshd.wire.errors import LocalProtocolError, RemoteProtocolError
from vshd.wire.proto3 import append_varint

LEGACY_MAX_DATA = 4000
# What a payload may have beside its data: 4096 is 4000 and this, and the extended limits follow the same sum (2.1).
FRAME_MARGIN = 96
LEGACY_MAX_PAYLOAD = LEGACY_MAX_DATA + FRAME_MARGIN

LENGTH_SIZE = 4
# A data frame's head: DataMessage's tag and length, its stream, the tag and length of its data.
_DATA_TAGS = (0x0A, 0x08, 0x12)
# Three bytes of a number reach 2 MiB, twice the largest frame there can be.
NUMBER_SIZE_MAX = 3
HEAD_MAX = LENGTH_SIZE + len(_DATA_TAGS) * (1 + NUMBER_SIZE_MAX)

# A frame with this much data is bulk: worth reading its head alone, so that the data need not pass through memory.
BULK_MIN = 1 << 14

# What a head turned out to be.
_UNDECIDED, _DATA, _OTHER = 0, 1, 2
# In place of a position.
_NOT_OURS, _MORE = 0, -1


class DataPiece:
    """Some bytes of a stream, as a view into what receive() was given: valid until the caller reuses that buffer."""

    __slots__ = ("data", "stream")

    def __init__(self, stream: int, data: memoryview) -> None:
        self.stream = stream
        self.data = data


def encode_frame(payload: bytes, max_payload: int) -> bytes:
    """`payload` with its length in front."""
    if len(payload) > max_payload:
        raise LocalProtocolError(f"Serialized message too large: {len(payload)}")
    return len(payload).to_bytes(LENGTH_SIZE, "little") + payload


def encode_data_head(stream: int, size: int) -> bytes:
    """Everything of a DataMessage frame that stands before its `size` bytes of data."""
    inner = bytearray((0x08, stream, 0x12))
    append_varint(inner, size)
    outer = bytearray((0x0A,))
    append_varint(outer, len(inner) + size)
    return (len(outer) + len(inner) + size).to_bytes(LENGTH_SIZE, "little") + bytes(outer) + bytes(inner)


class FrameReader:
    """Turns a stream of bytes into payloads and pieces of data.

    Invariant: at most one of `_head` (an undecided head), `_payload` (a payload being collected) and `_data_left`
    (data under way) is in use. `max_payload` may change between frames; while `splits_data` is False (before the setup
    is over) every payload is collected.
    """

    __slots__ = (
        "_data_left",
        "_head",
        "_known_head",
        "_known_size",
        "_known_stream",
        "_payload",
        "_payload_size",
        "_stream",
        "max_payload",
        "splits_data",
    )

    def __init__(self, max_payload: int) -> None:
        self.max_payload = max_payload
        self.splits_data = False
        self._head = bytearray()
        self._payload: bytearray | None = None
        self._payload_size = 0
        self._stream = 0
        self._data_left = 0
        # The last data head and what it said: bulk repeats it, and comparing is cheaper than parsing.
        self._known_head = b""
        self._known_stream = 0
        self._known_size = 0

    def bulk_left(self, stream: int) -> int:
        """What is still to come of a large data frame of `stream` under way; 0 when there is none."""
        return self._data_left if self._known_size >= BULK_MIN and self._stream == stream else 0

    def skip(self, size: int) -> None:
        """`size` bytes of that did not come through receive()."""
        self._data_left -= size

    @property
    def bulk_head_size(self) -> int:
        """What to receive at most, so that a large frame that may come next brings little but its head.

        The size of that head when the last frame was large; else a large frame's least, since scraps (what the credit
        left) come between large ones. 0 in the middle of a large frame, where bulk_left() says what comes.
        """
        if self._known_size < BULK_MIN:
            return BULK_MIN
        if self._data_left:
            return 0
        return BULK_MIN if self._head or self._payload is not None else len(self._known_head)

    @property
    def is_between_frames(self) -> bool:
        return not self._head and self._payload is None and self._data_left == 0

    def receive(self, view: memoryview, position: int) -> tuple[int, "DataPiece | bytes | None"]:
        """Reads on from `position`: the new position, and a payload, a piece of data, or None when `view` is used up.

        Raises RemoteProtocolError when a length exceeds max_payload.
        """
        if not self._data_left and self._payload is None:
            known = self._known_head
            if known and not self._head and view[position : position + len(known)] == known:
                position += len(known)
                self._stream = self._known_stream
                self._data_left = self._known_size
            else:
                position = self._receive_head(view, position)
        if self._data_left:
            end = min(len(view), position + self._data_left)
            self._data_left -= end - position
            return end, (DataPiece(self._stream, view[position:end]) if end > position else None)
        if self._payload is None:
            return position, None
        end = min(len(view), position + self._payload_size - len(self._payload))
        self._payload += view[position:end]
        if len(self._payload) < self._payload_size:
            return end, None
        payload = bytes(self._payload)
        self._payload = None
        return end, payload

    def _receive_head(self, view: memoryview, position: int) -> int:
        """Collects a head until it is decided; whatever was taken beyond it is left in `view`."""
        head = self._head
        taken = min(len(view) - position, HEAD_MAX - len(head))
        head += view[position : position + taken]
        verdict, size = self._parse_head(head)
        if verdict == _UNDECIDED:
            return position + taken
        used = min(size, len(head))
        if verdict == _OTHER:
            # A part of the payload may have been needed to decide.
            used = min(len(head), LENGTH_SIZE + self._payload_size)
            self._payload = head[LENGTH_SIZE:used]
        else:
            self._known_head = bytes(head[:size])
            self._known_stream = self._stream
            self._known_size = self._data_left
        position += taken - (len(head) - used)
        self._head = bytearray()
        return position

    def _parse_head(self, head: bytearray) -> tuple[int, int]:
        """The verdict, and for a data frame the size of its head."""
        if len(head) < LENGTH_SIZE:
            return _UNDECIDED, 0
        length = int.from_bytes(head[:LENGTH_SIZE], "little")
        if length > self.max_payload:
            raise RemoteProtocolError(f"Message size of {length} exceeds max message size {self.max_payload}")
        self._payload_size = length
        if not self.splits_data or length == 0:
            return _OTHER, 0
        position = LENGTH_SIZE
        end = LENGTH_SIZE + length
        for tag in _DATA_TAGS:
            value, position = _read_tagged(head, position, end, tag)
            if position <= 0:
                return (_OTHER if position == _NOT_OURS else _UNDECIDED), 0
            if tag == 0x08:
                self._stream = value
            elif value != end - position or value == 0:
                return _OTHER, 0
        self._data_left = value
        return _DATA, position


def _read_tagged(head: bytearray, position: int, end: int, tag: int) -> tuple[int, int]:
    """The number behind `tag`, and the position behind it; or _NOT_OURS, or _MORE when `head` does not say yet."""
    value = 0
    for index in range(1 + NUMBER_SIZE_MAX):
        if position >= end:
            return 0, _NOT_OURS
        if position >= len(head):
            return 0, _MORE
        byte = head[position]
        position += 1
        if index == 0:
            if byte != tag:
                return 0, _NOT_OURS
            continue
        value |= (byte & 0x7F) << (7 * (index - 1))
        if byte < 0x80:
            return value, position
    return 0, _NOT_OURS
