"""The core dumps that a guest sends to its host (docs/reference/protocol.md 5.7): facts, pieces, and an end for each.

No I/O. A frame is a kind, the length of its payload, and the payload. The host trusts no order and no length.
"""

from vshd.wire.errors import RemoteProtocolError
from vshd.wire.proto3 import BOOL, BYTES, UINT32, UINT64, Field, Message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# The kinds of frames.
BEGIN, DATA, END, LOST, HOLE = 1, 2, 3, 4, 5
# The one byte of an END: the core is whole, has reached the ceiling, or broke off.
WHOLE, CUT, BROKEN = 0, 1, 2
HEAD_SIZE = 5
DATA_MAX = 1 << 18
# Most of it are the maps, of which the guest sends so much.
MAPS_MAX = 1 << 19
COMMAND_MAX = 1 << 16
PATH_MAX = 4096
FACTS_MAX = 1 << 20
HOLE_SIZE = 8
_MAXIMA = {BEGIN: FACTS_MAX, DATA: DATA_MAX, END: 1, LOST: 4, HOLE: HOLE_SIZE}


class CoreFacts(Message):
    """What the guest's kernel and /proc tell of a program that dumps its core.

    pid, uid, gid: in the guest's first namespaces. time_s: since 1970, of the guest. name: of the thread. command: its
    words, each with a NUL behind it. exe: the path of its program, as its own root has it. maps: of its memory, as
    /proc has them. cgroup: its control group. is_contained: it is in another PID namespace than vshd.
    """

    __slots__ = ("cgroup", "command", "exe", "gid", "is_contained", "maps", "name", "pid", "signal", "time_s", "uid")

    FIELDS = (
        Field(1, "pid", UINT32),
        Field(2, "uid", UINT32),
        Field(3, "gid", UINT32),
        Field(4, "signal", UINT32),
        Field(5, "time_s", UINT64),
        Field(6, "name", BYTES),
        Field(7, "command", BYTES),
        Field(8, "exe", BYTES),
        Field(9, "maps", BYTES),
        Field(10, "cgroup", BYTES),
        Field(11, "is_contained", BOOL),
    )

    def __init__(self) -> None:
        self.pid = 0
        self.uid = 0
        self.gid = 0
        self.signal = 0
        self.time_s = 0
        self.name = b""
        self.command = b""
        self.exe = b""
        self.maps = b""
        self.cgroup = b""
        self.is_contained = False


def encode_head(kind: int, size: int) -> bytes:
    """What stands before a payload of so many bytes."""
    return bytes((kind,)) + size.to_bytes(HEAD_SIZE - 1, "little")


def encode(kind: int, payload: bytes) -> bytes:
    """A frame."""
    return encode_head(kind, len(payload)) + payload


def encode_hole(size: int) -> bytes:
    """A frame for so many zeros of a core."""
    return encode(HOLE, size.to_bytes(HOLE_SIZE, "little"))


class CoreReader:
    """Takes the guest's bytes apart. Invariant: between BEGIN and END there is one core, of DATA and HOLEs."""

    def __init__(self) -> None:
        self._held = b""
        self._is_open = False

    def feed(self, data: bytes) -> "Iterator[tuple[int, CoreFacts | bytes | int]]":
        """Yields each whole frame: BEGIN with its facts, DATA with its bytes, the others with their number.

        Raises RemoteProtocolError.
        """
        held = self._held + data if self._held else data
        at = 0
        while len(held) - at >= HEAD_SIZE:
            kind, size = held[at], int.from_bytes(held[at + 1 : at + HEAD_SIZE], "little")
            if size > _MAXIMA.get(kind, -1):
                raise RemoteProtocolError(f"a frame of a core of kind {kind} with {size} bytes")
            if len(held) - at - HEAD_SIZE < size:
                break
            payload = held[at + HEAD_SIZE : at + HEAD_SIZE + size]
            at += HEAD_SIZE + size
            yield kind, self._take(kind, payload)
        self._held = held[at:]

    def _take(self, kind: int, payload: bytes) -> "CoreFacts | bytes | int":
        if (kind in (DATA, HOLE, END)) != self._is_open:
            raise RemoteProtocolError(f"a frame of kind {kind} {'within' if self._is_open else 'outside'} a core")
        if kind == DATA:
            return payload
        if kind == BEGIN:
            self._is_open = True
            facts = CoreFacts()
            facts.merge(payload)
            return facts
        if kind == END:
            self._is_open = False
        return int.from_bytes(payload, "little")
