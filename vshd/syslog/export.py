"""The Journal Export Format as systemd's journal sends it (ForwardToSocket): finds the few fields that a log needs.

No I/O. A record is lines `NAME=value`, or a line `NAME` with a size of 8 bytes and the value behind it, and an empty
line at its end. The fields that begin with `_` are the journal's own: it takes none of that kind from a program.
"""

from vshd.carry.records import FIELDS, HAS_WRITER, IS_CUT, TEXT_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.syslog.sources import Add

WANTED = frozenset(
    (
        *(b"MESSAGE", b"PRIORITY", b"SYSLOG_FACILITY", b"SYSLOG_IDENTIFIER", b"SYSLOG_PID"),
        *(b"_PID", b"_UID", b"_GID", b"_COMM", b"_SYSTEMD_UNIT", b"_TRANSPORT"),
        *(b"_SOURCE_REALTIME_TIMESTAMP", b"__REALTIME_TIMESTAMP"),
    )
)
# Of a value that is kept. A longer one goes by.
VALUE_MAX = TEXT_MAX
# Of the name of a program or a unit.
NAME_MAX = 255
# Of a line: the longest name of a field, and the value.
LINE_MAX = 64 + 1 + VALUE_MAX
SIZE_BYTES = 8
# The journal's own for a record without one (systemd.journal-fields(7)): info, and of the facility user.
USUAL_LEVEL, USUAL_FACILITY = 6, 1
_DIGITS = frozenset(b"0123456789")
_ID_MAX, _TIME_MAX_US = (1 << 32) - 1, (1 << 63) // 1000


class ExportReader:
    """Invariant: of a value, `_left` bytes and a line end are to come; `_held` is the beginning of a line or a size."""

    __slots__ = ("_fields", "_held", "_is_long", "_is_sized", "_left", "_name", "_value")

    def __init__(self) -> None:
        self._fields: dict[bytes, bytes] = {}
        self._held = b""
        self._name = b""
        self._value = b""
        self._left = 0
        self._is_sized = False
        self._is_long = False

    def feed(self, data: bytes) -> list[dict[bytes, bytes]]:
        """The records that are whole now, with the fields of WANTED alone."""
        data = self._held + data
        records = []
        at, end = 0, len(data)
        while at < end:
            if self._left:
                at = self._take_value(data, at)
            elif self._is_sized:
                if end - at < SIZE_BYTES:
                    break
                # The line end behind it is a part of this.
                self._left = int.from_bytes(data[at : at + SIZE_BYTES], "little") + 1
                self._is_sized = False
                at += SIZE_BYTES
            else:
                found = data.find(b"\n", at)
                if found < 0:
                    break
                line = data[at:found]
                at = found + 1
                if not line:
                    if self._fields:
                        records.append(self._fields)
                        self._fields = {}
                else:
                    self._take_line(line)
        self._hold(data, at)
        return records

    def _hold(self, data: bytes, at: int) -> None:
        self._held = data[at:]
        if len(self._held) > LINE_MAX:
            # Its beginning is enough, and what follows is dropped with each feed().
            self._held = self._held[:LINE_MAX]
            self._is_long = True

    def _take_line(self, line: bytes) -> None:
        name, equals, value = line.partition(b"=")
        if not equals and not self._is_long:
            self._name, self._value, self._is_sized = name, b"", True
        self._is_long = False
        if equals:
            self._put(name, value)

    def _take_value(self, data: bytes, at: int) -> int:
        """Takes what has come of a value with a size; where the next byte is."""
        taken = min(self._left, len(data) - at)
        self._left -= taken
        # The line end is no part of it.
        until = at + taken - (not self._left)
        room = VALUE_MAX + 1 - len(self._value)
        if room > 0 and self._name in WANTED:
            self._value += data[at : min(until, at + room)]
        if not self._left:
            self._put(self._name, self._value)
            self._value = b""
        return at + taken

    def _put(self, name: bytes, value: bytes) -> None:
        # A program may write a field twice; the first one counts.
        if name in WANTED and name not in self._fields:
            self._fields[name] = value[: VALUE_MAX + 1]


def add_record(add: "Add", fields: dict[bytes, bytes], now_ns: int) -> None:
    """Gives a record of the journal to the collector. now_ns: for one without a time."""
    if fields.get(b"_TRANSPORT") == b"kernel":
        # The collector reads these itself.
        return
    level = _find_number(fields, b"PRIORITY", 7, USUAL_LEVEL)
    facility = _find_number(fields, b"SYSLOG_FACILITY", 23, USUAL_FACILITY)
    flags = 0
    uid = _find_number(fields, b"_UID", _ID_MAX, -1)
    writer = (0, 0, 0)
    if uid >= 0:
        flags = HAS_WRITER
        writer = (
            _find_number(fields, b"_PID", _ID_MAX, 0),
            uid,
            _find_number(fields, b"_GID", _ID_MAX, 0),
        )
    time_us = _find_number(fields, b"_SOURCE_REALTIME_TIMESTAMP", _TIME_MAX_US, 0)
    time_us = time_us or _find_number(fields, b"__REALTIME_TIMESTAMP", _TIME_MAX_US, 0)
    head = b"\0".join(
        (
            b"%d" % (facility << 3 | level),
            _clean(fields.get(b"_SYSTEMD_UNIT", b"")),
            _clean(fields.get(b"SYSLOG_IDENTIFIER") or fields.get(b"_COMM", b"")),
            b"%d" % _find_number(fields, b"SYSLOG_PID", _ID_MAX, 0),
            b"",
        )
    )
    text = fields.get(b"MESSAGE", b"")
    room = TEXT_MAX - len(head)
    if len(text) > room:
        flags |= IS_CUT
    add(FIELDS, flags, time_us * 1000 or now_ns, writer, head + text[:room])


def _find_number(fields: dict[bytes, bytes], name: bytes, most: int, usual: int) -> int:
    value = fields.get(name, b"")
    if not 0 < len(value) <= 20 or not _DIGITS.issuperset(value):
        return usual
    number = int(value)
    return number if number <= most else usual


def _clean(name: bytes) -> bytes:
    return name[:NAME_MAX].replace(b"\0", b"?")
