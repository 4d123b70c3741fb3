"""What a record of a guest's log says: its lines as programs and the kernel write them, as values. Pure.

Every byte is the guest's. Whatever it writes is a line: what is no syslog line has the facility `user`, the priority
`notice` and no name (RFC 3164, 4.3.3).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vmkit.memory.lines import FACILITIES, LEVELS
from vshd.carry.records import COLLECTOR, FIELDS, HAS_WRITER, IS_CUT, JOURNAL, KERNEL, SYSLOG, LogRecord

SOURCES: Mapping[int, str] = {
    SYSLOG: "syslog",
    KERNEL: "kernel",
    COLLECTOR: "collector",
    JOURNAL: "journal",
    FIELDS: "journal",
}
# user.notice
_USUAL = 13
# No facility above 23 exists in syslog (RFC 5424, 6.2.1).
_PRIORITY_MAX = 191
_PRIORITY = re.compile(rb"<(\d{1,3})>")
# The time of RFC 3164, which names no year and no zone, or the longer one of programs that send a line on. The
# collector's is better.
_TIME = re.compile(
    rb"(?:[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d|"
    rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)) "
)
# Programs that send lines on put their host's name behind the time.
_HOST = re.compile(rb"([^\s:\[\]<>]{1,255}) ")
_IDENT = re.compile(rb"([^\s:\[\]<>]{1,64})(?:\[(\d{1,10})\])?: ?")
# RFC 5424, 6: version, time, host, name, process, message id, structured data.
_NEW = re.compile(
    rb'1 \S{1,64} \S{1,255} (\S{1,64}) (\S{1,128}) \S{1,32} (?:-|(?:\[(?:[^\]\\"]|"(?:\\.|[^"\\])*")*\])+)(?: |$)',
    re.DOTALL,
)
_BOM = b"\xef\xbb\xbf"
# `6,339,5140900,-;text`, then lines with a blank in front for what else the kernel knows.
_KERNEL = re.compile(rb"(\d{1,6}),\d{1,20},\d{1,20},[^;\n]{0,64};([^\n]*)")
# Priority, unit, name and the process id that the writer claims, each with a NUL behind it, and the message.
_FIELDS = re.compile(rb"(\d{1,3})\0([^\0]{0,255})\0([^\0]{0,255})\0(\d{1,10})\0(.*)", re.DOTALL)
_LEVEL_BITS = 3
NS = 1_000_000_000


class LogLine(NamedTuple):
    """priority: facility and level as one number. claimed: the process id that the line has. more: other keys."""

    priority: int
    ident: bytes
    claimed: int | None
    text: bytes
    more: Mapping[str, bytes] = {}


def parse_record(record: LogRecord) -> dict[str, object]:
    """The record as the keys and values that docs/reference/files.md describes, without those of the host."""
    line = _PARSERS.get(record.source, _parse_line)(record.text)
    facility, level = divmod(line.priority, 1 << _LEVEL_BITS)
    has_writer = bool(record.flags & HAS_WRITER)
    value: dict[str, object] = {
        "time": round(record.time_ns / NS, 6),
        "number": record.number,
        "source": SOURCES.get(record.source, str(record.source)),
        "facility": FACILITIES[facility] if facility < len(FACILITIES) else str(facility),
        "priority": LEVELS[level],
        "ident": line.ident.decode(errors="replace"),
        "pid": record.pid if has_writer else None,
        "uid": record.uid if has_writer else None,
        "gid": record.gid if has_writer else None,
        "text": line.text.decode(errors="replace"),
    }
    if line.claimed is not None and line.claimed != value["pid"]:
        value["claimed_pid"] = line.claimed
    if record.flags & IS_CUT:
        value["cut"] = True
    return value | {key: word.decode(errors="replace") for key, word in line.more.items()}


def _parse_line(line: bytes) -> LogLine:
    line = line.rstrip(b"\0\n")
    found = _PRIORITY.match(line)
    priority = _USUAL
    if found is not None and int(found[1]) <= _PRIORITY_MAX:
        priority, line = int(found[1]), line[found.end() :]
        new = _NEW.match(line)
        if new is not None:
            ident = b"" if new[1] == b"-" else new[1]
            claimed = int(new[2]) if new[2].isdigit() and len(new[2]) <= 10 else None
            return LogLine(priority, ident, claimed, line[new.end() :].removeprefix(_BOM))
    time = _TIME.match(line)
    if time is not None:
        line = line[time.end() :]
        host = _HOST.match(line)
        if host is not None and _IDENT.match(line, host.end()):
            return LogLine(priority, *_parse_ident(line[host.end() :]), {"host": host[1]})
    return LogLine(priority, *_parse_ident(line))


def _parse_kernel(line: bytes) -> LogLine:
    found = _KERNEL.match(line)
    if found is None:
        return LogLine(_USUAL, b"", None, line)
    priority = int(found[1])
    if priority >> _LEVEL_BITS == 0:
        return LogLine(priority, b"kernel", None, found[2])
    # A program of root's wrote it to /dev/kmsg.
    return LogLine(priority, *_parse_ident(found[2]))


def _parse_fields(line: bytes) -> LogLine:
    found = _FIELDS.fullmatch(line)
    if found is None or int(found[1]) > _PRIORITY_MAX:
        return LogLine(_USUAL, b"", None, line)
    more = {"unit": found[2]} if found[2] else {}
    return LogLine(int(found[1]), found[3], int(found[4]) or None, found[5].rstrip(b"\n"), more)


def _parse_ident(line: bytes) -> tuple[bytes, int | None, bytes]:
    found = _IDENT.match(line)
    if found is None:
        return b"", None, line
    return found[1], int(found[2]) if found[2] else None, line[found.end() :]


_PARSERS: Mapping[int, Callable[[bytes], LogLine]] = {KERNEL: _parse_kernel, FIELDS: _parse_fields}
