"""The log of a guest as the host keeps it: reads the records, chooses among them, and renders them for a person.

Each record is a JSON object on a line; docs/reference/files.md has its keys. A rendered record is one line, whatever
the guest wrote: no record can pass for another one.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from vmkit.errors import ConfigError, MachineError
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.running import SYSLOG, find_logs, find_named, follow_log, pick_entry, read_log
from vmkit.machine.spec import check_name
from vmkit.machine.words import TakeSyslog
from vmkit.memory.lines import LEVELS
from vsh.registry import Entry

# The guest may still be busy with its boot.
TAKE_DEADLINE_S = 60.0
# A record is a line of a program, 8 KiB at most, and each byte can take six characters of JSON.
LINE_MAX = 64 * 1024
_OTHER_LEVELS = {"panic": 0, "emergency": 0, "critical": 2, "error": 3, "warning": 4}
_AGO = re.compile(r"(\d{1,9})([smhd])")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_OLDER_SUFFIX = ".1"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which records are wanted. since_s: of the host's time, since 1970. level: the least severe one that counts."""

    since_s: float = 0.0
    level: int = len(LEVELS) - 1
    pattern: re.Pattern[str] | None = None

    def is_wanted(self, record: Mapping[str, object]) -> bool:
        """Whether a record is one of these."""
        arrived_s = record.get("t")
        if not isinstance(arrived_s, int | float) or arrived_s < self.since_s:
            return False
        priority = record.get("priority")
        if priority in LEVELS and LEVELS.index(str(priority)) > self.level:
            return False
        return self.pattern is None or self.pattern.search(f"{record.get('ident')}: {record.get('text')}") is not None


def parse_since(text: str, now_s: float) -> float:
    """The time of `10m`, `2h`, or of a date and time of this host's zone. Raises ConfigError."""
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return now_s - int(ago[1]) * _UNITS_S[ago[2]]
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(text).timestamp()
    raise ConfigError(f"--since must be a time such as 10m, 2h or '2026-11-30 12:00', not '{text}'")


def parse_level(text: str) -> int:
    """The number of a priority's name, 0 for the most severe one. Raises ConfigError."""
    word = text.lower()
    if word in LEVELS:
        return LEVELS.index(word)
    if word in _OTHER_LEVELS:
        return _OTHER_LEVELS[word]
    if word.isascii() and word.isdecimal() and int(word) < len(LEVELS):
        return int(word)
    raise ConfigError(f"--priority must be one of {', '.join(LEVELS)}, not '{text}'")


def parse_pattern(text: str) -> re.Pattern[str]:
    """A regular expression. Raises ConfigError."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"--grep must be a regular expression, not '{text}': {error}") from error


def read_records(
    name: str | None, *, is_following: bool = False, warn: Callable[[str], None] = lambda _text: None
) -> Iterator[dict[str, object]]:
    """The records of a machine, oldest first; is_following: and each new one until the machine ends.

    All that the guest has logged until now is there. Where it cannot be asked, warn is told so. Raises MachineError,
    ConfigError.
    """
    running = pick_entry(None) if name is None else find_named(check_name(name))
    folder = find_logs(name if running is None else running.name)
    trouble = "" if running is None else _take(running)
    if not (folder / Layout.SYSLOG).exists():
        raise MachineError(f"there is no syslog of '{folder.name}'" + (f": {trouble}" if trouble else ""))
    if trouble:
        warn(f"the newest lines may be missing: {trouble}")
    pieces = follow_log(folder, SYSLOG) if is_following else read_log(folder, SYSLOG)
    for line in _split(join_files(folder, pieces)):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def read_lines(name: str) -> bytes:
    """All records of a machine, a JSON object a line. Raises MachineError, ConfigError."""
    return b"".join(json.dumps(record).encode() + b"\n" for record in read_records(name))


def _take(entry: Entry) -> str:
    """Has the monitor fetch what the guest has logged; what is wrong, else ""."""
    try:
        with stop.open_control(entry) as control:
            answer = control.ask(TakeSyslog(), TAKE_DEADLINE_S)
    except MachineError as error:
        return error.brief
    return "" if answer.ok else answer.error


def join_files(folder: Path, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The file before this one comes first. pieces: of this one, which is opened for the first of them.

    The monitor may rename it at any moment. It is open before the older one is looked for, so none is between them; and
    no record is twice where it has become the older one.
    """
    first = next(pieces, b"")
    with contextlib.suppress(OSError):
        older = (folder / (Layout.SYSLOG + _OLDER_SUFFIX)).read_bytes()
        if not first or not older.startswith(first):
            yield older
    yield first
    yield from pieces


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The whole lines in a stream of bytes."""
    held = b""
    for piece in pieces:
        *lines, held = (held + piece).split(b"\n")
        yield from lines
        if len(held) > LINE_MAX:
            held = b""


def render_record(record: Mapping[str, object]) -> str:
    """One line: time in the guest, priority, who wrote it, text. A user other than root is named by its number."""
    when = record.get("time")
    ident = escape(str(record.get("ident") or "-"))
    pid, uid = record.get("pid"), record.get("uid")
    who = ident + (f"[{pid}]" if pid is not None else "") + (f" uid={uid}" if uid else "")
    end = " ..." if record.get("cut") else ""
    return f"{_render_time(when)} {record.get('priority', '?')!s:<6} {who}: {escape(str(record.get('text')))}{end}"


def _render_time(when: object) -> str:
    if isinstance(when, int | float):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) + f".{int(when % 1 * 1000):03d}"
    return "????-??-?? ??:??:??.???"


def escape(text: str) -> str:
    """The text on one line, with escapes for all that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)
