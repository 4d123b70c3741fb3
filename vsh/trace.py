"""Prints a session's frames for --debug: one line per frame, in both directions, with all fields but bulk data.

Reads a copy of the bytes with frame readers of its own, and can neither delay nor change the session.
"""

import time

from vsh.patience import write_patiently
from vshd.wire import messages
from vshd.wire.connection import MAX_DATA_RANGE
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.frames import FRAME_MARGIN, FrameReader
from vshd.wire.messages import GuestMessage, HostMessage, SetupConnectionRequest, SetupConnectionResponse
from vshd.wire.proto3 import BYTES, Message, Oneof

# What a line shows of a long value.
SHOWN_MAX = 48
SENT, RECEIVED = ">", "<"


class Trace:
    """Invariant: each direction's reader has got every byte so far, in order."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._directions = {
            SENT: _Direction(SENT, SetupConnectionRequest, GuestMessage),
            RECEIVED: _Direction(RECEIVED, SetupConnectionResponse, HostMessage),
        }

    def see(self, direction: str, data: "bytes | memoryview") -> None:
        """Prints the frames that `data` completes."""
        at_ms = (time.monotonic() - self._started_s) * 1000
        for line in self._directions[direction].describe(data):
            write_patiently(2, f"vsh: debug: {at_ms:9.3f} ms {direction} {line}\r\n".encode())


class _Direction:
    def __init__(self, name: str, first: type[Message], later: type[Oneof]) -> None:
        self._name = name
        self._reader = FrameReader(MAX_DATA_RANGE[1] + FRAME_MARGIN)
        self._first: type[Message] | None = first
        self._later = later

    def describe(self, data: "bytes | memoryview") -> list[str]:
        lines: list[str] = []
        view = memoryview(data)
        position = 0
        try:
            while True:
                position, payload = self._reader.receive(view, position)
                if not isinstance(payload, bytes):
                    return lines
                lines.append(f"{len(payload):7} bytes {self._describe_payload(payload)}")
        except RemoteProtocolError as error:
            lines.append(f"no frame: {error}")
            self._reader = FrameReader(MAX_DATA_RANGE[1] + FRAME_MARGIN)
            return lines

    def _describe_payload(self, payload: bytes) -> str:
        message: Message | Oneof = self._later() if self._first is None else self._first()
        self._first = None
        message.merge(payload)
        return describe_message(message)


def describe_message(message: "Message | Oneof") -> str:
    """Returns a message on one line, without fields that have their defaults."""
    name = type(message).__name__
    if isinstance(message, Oneof):
        for field in message.FIELDS:
            if field.number == message.member:
                return f"{field.name} {_describe_value(message.value)}"
        return f"{name} of an unknown kind"
    return f"{name} {_describe_fields(message)}"


def _describe_fields(message: Message) -> str:
    parts = []
    for field in message.FIELDS:
        value = getattr(message, field.name)
        if isinstance(message, messages.DataMessage) and field.kind == BYTES:
            parts.append(f"{len(value)} bytes" if value else "end")
        elif value:
            parts.append(f"{field.name}={_describe_value(value)}")
    return " ".join(parts)


def _describe_value(value: object) -> str:
    if isinstance(value, Message):
        return "{" + _describe_fields(value) + "}"
    text = repr(value)
    return text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."
