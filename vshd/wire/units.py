"""The failed services that a guest reports to its host (docs/reference/protocol.md 5.8): facts, and a count.

No I/O. A frame is a kind, the length of its payload, and the payload. The host trusts no length.
"""

from vshd.wire.errors import RemoteProtocolError
from vshd.wire.proto3 import BOOL, BYTES, UINT32, UINT64, Field, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# The kinds of frames.
FAILED, LOST = 1, 2
HEAD_SIZE = 5
FACTS_MAX = 4096
_MAXIMA = {FAILED: FACTS_MAX, LOST: 4}
# systemd's UNIT_NAME_MAX.
NAME_MAX = 255
RESULT_MAX = 64
INVOCATION_SIZE = 16
# How the main process ended: the codes of waitid(2). NO_END: it is not known, or there was none.
NO_END, EXITED, KILLED, DUMPED = 0, 1, 2, 3


class UnitFacts(Message):
    """What the guest's service manager tells of a service that failed.

    result: its word, such as exit-code. code, status: how the main process ended. pid: that process's. invocation: the
    id of this run of the service. time_s: since 1970, of the guest. restarts: how often the manager has started it
    again. is_restarted: the manager starts it once more.
    """

    __slots__ = ("code", "invocation", "is_restarted", "pid", "restarts", "result", "status", "time_s", "unit")

    FIELDS = (
        Field(1, "unit", BYTES),
        Field(2, "result", BYTES),
        Field(3, "code", UINT32),
        Field(4, "status", UINT32),
        Field(5, "pid", UINT32),
        Field(6, "invocation", BYTES),
        Field(7, "time_s", UINT64),
        Field(8, "restarts", UINT32),
        Field(9, "is_restarted", BOOL),
    )

    def __init__(self) -> None:
        self.unit = b""
        self.result = b""
        self.code = NO_END
        self.status = 0
        self.pid = 0
        self.invocation = b""
        self.time_s = 0
        self.restarts = 0
        self.is_restarted = False


def encode(kind: int, payload: bytes) -> bytes:
    """A frame."""
    return bytes((kind,)) + len(payload).to_bytes(HEAD_SIZE - 1, "little") + payload


class UnitReader:
    """Takes the guest's bytes apart."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> "Iterator[UnitFacts | int]":
        """Yields each whole frame: the facts of a failure, or the number of those that were left out.

        Raises RemoteProtocolError.
        """
        held = self._held + data
        at = 0
        while len(held) - at >= HEAD_SIZE:
            kind, size = held[at], int.from_bytes(held[at + 1 : at + HEAD_SIZE], "little")
            if size > _MAXIMA.get(kind, -1):
                raise RemoteProtocolError(f"a frame of a failed service of kind {kind} with {size} bytes")
            if len(held) - at - HEAD_SIZE < size:
                break
            payload = held[at + HEAD_SIZE : at + HEAD_SIZE + size]
            at += HEAD_SIZE + size
            if kind == LOST:
                yield int.from_bytes(payload, "little")
                continue
            facts = UnitFacts()
            facts.merge(payload)
            yield facts
        self._held = held[at:]
