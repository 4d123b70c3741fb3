"""The kernel's log as lines, as `dmesg --raw` prints them: `<6>[    0.000000] text`. Pure.

`dmesg --file` of util-linux reads them, too.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vmkit.memory.ring import PrintkRecord

# A log file has no more than this (vmkit.monitor.logs).
MAX_LOG_BYTES = 4 * 1024 * 1024
# <linux/kern_levels.h>, <sys/syslog.h>
LEVELS = ("emerg", "alert", "crit", "err", "warn", "notice", "info", "debug")
FACILITIES = (
    *("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp"),
    *(str(number) for number in range(12, 256)),
)
_LEVEL_BITS = 3
_NS_PER_US, _US_PER_S = 1000, 1_000_000
_LINE = re.compile(rb"<(\d{1,4})>(\[ *(\d{1,20})\.(\d{6})\] (.*))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KernelLine:
    """One line of a kernel's log. level: a word such as "err". facility: "kern", or "user" and others for programs.

    time_s: seconds since the kernel's start. text: as the guest wrote it; bytes that are no UTF-8 become U+FFFD.
    """

    level: str
    facility: str
    time_s: float
    text: str


def render_records(records: "Iterable[PrintkRecord]") -> bytes:
    """The records as lines, each with its prefix. The newest that fit into MAX_LOG_BYTES."""
    pieces = []
    left_bytes = MAX_LOG_BYTES
    for record in reversed(list(records)):
        seconds, micros = divmod(record.time_ns // _NS_PER_US, _US_PER_S)
        prefix = b"<%d>[%5d.%06d] " % (record.facility << _LEVEL_BITS | record.level, seconds, micros)
        piece = b"".join(prefix + line + b"\n" for line in record.text.split(b"\n"))
        left_bytes -= len(piece)
        if left_bytes < 0:
            break
        pieces.append(piece)
    pieces.reverse()
    return b"".join(pieces)


def parse_lines(data: bytes) -> Iterator[KernelLine]:
    """The lines of a log. Leaves out what is no such line."""
    for line in data.split(b"\n"):
        found = _LINE.fullmatch(line)
        if found:
            facility, level = divmod(int(found[1]), 1 << _LEVEL_BITS)
            if facility < len(FACILITIES):
                time_s = int(found[3]) + int(found[4]) / _US_PER_S
                yield KernelLine(LEVELS[level], FACILITIES[facility], time_s, found[5].decode(errors="replace"))


def strip_levels(data: bytes) -> bytes:
    """The lines as `dmesg` prints them, without `<6>`."""
    return b"\n".join(found[2] if (found := _LINE.fullmatch(line)) else line for line in data.split(b"\n"))
