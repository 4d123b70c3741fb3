"""The messages about lasting sessions that are not a client's request (docs/reference/protocol.md 7).

A SessionRecord travels to clients. A KeeperCall and its KeeperAnswer travel between two processes of one guest. Knows
nothing of sockets.
"""

from vshd.wire import messages
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.frames import LENGTH_SIZE, encode_frame
from vshd.wire.messages import Extended, Failure
from vshd.wire.proto3 import BOOL, BYTES, INT32, MESSAGE, SINT32, UINT32, UINT64, Field, Message
from vshd.wire.requests import Attach

# A record's frame; with names and commands cut as below, it is far smaller.
RECORD_MAX = 4096
COMMAND_MAX = 1024
# What a client takes of a list: sessions of all users.
RECORDS_MAX = 10_000

ID_DIGITS = 8
NAME_MAX = 64
_NAME_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_ID_LETTERS = frozenset(b"0123456789abcdef")

# Verbs of KeeperCall.
LOOK, SIGNAL, FORGET, ATTACH = 1, 2, 3, 4


class SessionRecord(Message):
    """One lasting session. Times are seconds since 1970; ended_s: 0 while it runs. start, end: the offsets of the
    output that is kept. pid: 0 when the session's keeper did not answer, and then nothing but id and uid is known.
    """

    __slots__ = (
        "code",
        "command",
        "core_dumped",
        "end",
        "ended_s",
        "file",
        "has_pty",
        "has_writer",
        "id",
        "name",
        "pid",
        "signal",
        "size",
        "start",
        "started_s",
        "uid",
        "user",
        "watchers",
    )

    FIELDS = (
        Field(1, "id", BYTES),
        Field(2, "name", BYTES),
        Field(3, "user", BYTES),
        Field(4, "uid", UINT32),
        Field(5, "pid", INT32),
        Field(6, "command", BYTES),
        Field(7, "started_s", UINT64),
        Field(8, "ended_s", UINT64),
        Field(9, "code", SINT32),
        Field(10, "signal", UINT32),
        Field(11, "core_dumped", BOOL),
        Field(12, "start", UINT64),
        Field(13, "end", UINT64),
        Field(14, "watchers", UINT32),
        Field(15, "has_writer", BOOL),
        Field(16, "has_pty", BOOL),
        Field(17, "size", UINT64),
        Field(18, "file", BYTES),
    )

    def __init__(self) -> None:
        self.id = b""
        self.name = b""
        self.user = b""
        self.uid = 0
        self.pid = 0
        self.command = b""
        self.started_s = 0
        self.ended_s = 0
        self.code = 0
        self.signal = 0
        self.core_dumped = False
        self.start = 0
        self.end = 0
        self.watchers = 0
        self.has_writer = False
        self.has_pty = False
        self.size = 0
        self.file = b""

    @property
    def has_ended(self) -> bool:
        return self.ended_s > 0


class KeeperCall(Message):
    """What a process of vshd asks the keeper of a session for. caller: the client's uid plus 1; 0: no client."""

    __slots__ = ("attach", "caller", "early", "is_deferred", "peer", "signal", "verb", "who")

    FIELDS = (
        Field(1, "verb", INT32),
        Field(2, "caller", UINT64),
        Field(3, "signal", UINT32),
        Field(4, "attach", MESSAGE, Attach),
        Field(5, "peer", MESSAGE, Extended),
        Field(6, "is_deferred", BOOL),
        Field(7, "early", BYTES),
        Field(8, "who", BYTES),
    )

    def __init__(self, verb: int = 0, caller: int = 0) -> None:
        self.verb = verb
        self.caller = caller
        self.signal = 0
        self.attach: Attach | None = None
        self.peer: Extended | None = None
        self.is_deferred = False
        self.early = b""
        self.who = b""


class KeeperAnswer(Message):
    """The keeper's answer. failure: with the description, when it did not do what was asked."""

    __slots__ = ("description", "failure", "record")

    FIELDS = (
        Field(1, "description", BYTES),
        Field(2, "failure", MESSAGE, Failure),
        Field(3, "record", MESSAGE, SessionRecord),
    )

    def __init__(
        self, description: bytes = b"", failure: Failure | None = None, record: SessionRecord | None = None
    ) -> None:
        self.description = description
        self.failure = failure
        self.record = record


class ListReader:
    """Turns the bytes of a list into records. Invariant: `_held` is less than one frame."""

    def __init__(self) -> None:
        self._held = b""
        self._count = 0

    def receive(self, data: bytes) -> list[SessionRecord]:
        """The records that are whole now. Raises RemoteProtocolError."""
        held, position, records = self._held + data, 0, []
        while len(held) - position >= LENGTH_SIZE:
            size = int.from_bytes(held[position : position + LENGTH_SIZE], "little")
            if size > RECORD_MAX:
                raise RemoteProtocolError(f"a record of {size} bytes")
            end = position + LENGTH_SIZE + size
            if len(held) < end:
                break
            record = SessionRecord()
            record.merge(held[position + LENGTH_SIZE : end])
            records.append(record)
            position = end
        self._held = held[position:]
        self._count += len(records)
        if self._count > RECORDS_MAX:
            raise RemoteProtocolError(f"more than {RECORDS_MAX} sessions")
        return records

    @property
    def is_between_records(self) -> bool:
        return not self._held


def encode_record(record: SessionRecord) -> bytes:
    """One frame of a list."""
    return encode_frame(record.encode(), RECORD_MAX)


def is_id(text: bytes) -> bool:
    """Whether this is an id; such a name would be taken for one."""
    return len(text) == ID_DIGITS and _ID_LETTERS.issuperset(text)


def is_name(text: bytes) -> bool:
    """Whether a session can have this name, or has it: 1 to 64 letters, digits, `.`, `_`, `-`, the first no `.` or `-`,
    and no id."""
    return 0 < len(text) <= NAME_MAX and _NAME_LETTERS.issuperset(text) and text[:1] not in b".-" and not is_id(text)


def check_attach(attach: Attach) -> str:
    """What is wrong with such a request; empty for nothing."""
    if not messages.BOTH <= attach.mode <= messages.WAIT:
        return f"{attach.mode} is no mode of a client"
    return ""
