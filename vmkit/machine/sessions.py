"""The sessions of a machine, from vshd's lines in the kernel's log: who, what, when, the end, and bytes. Pure.

A guest's root can write any line into that log. Other users of the guest cannot, and no client's words can pass for a
line (vshd/session/audit.py).
"""

import json
import re
from collections.abc import Iterator, Sequence

from vmkit.memory.lines import KernelLine, parse_lines

SIGNALLED = 128
_LINE = re.compile(
    r"vshd: (?P<peer>vsock \d+:\d+|unix|session \w+)(?: user (?P<user>[^:]*))?: "
    # What stands behind the first ", since " is of the client.
    r"(?:(?P<end>(?:(?!, since ).)*?) after (?P<seconds>\d{1,12}\.\d{3}) s"
    r"(?:, (?P<bytes_in>\d{1,20}) bytes in, (?P<bytes_out>\d{1,20}) bytes out)?|refused)"
    r", since (?P<since>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ): (?P<command>.*)",
    re.DOTALL,
)
_END = re.compile(r"(exit|signal) (\d{1,3})(?!\d)")


def render_sessions(log: bytes) -> bytes:
    """The sessions in a kernel's log (vmkit.memory.lines), a JSON object a line."""
    return b"".join(render_line(line) for line in parse_lines(log))


def render_line(line: KernelLine) -> bytes:
    """The session of one line; empty where the line is of no session. docs/reference/files.md has the keys."""
    found = _LINE.fullmatch(line.text)
    if found is None or line.facility == "kern":
        return b""
    end = found["end"] or "refused"
    how = _END.match(end)
    session: dict[str, object] = {
        "since": found["since"],
        "peer": found["peer"],
        "user": found["user"],
        "command": found["command"],
        "end": end.rstrip(","),
        "exit": None if how is None else int(how[2]) + (SIGNALLED if how[1] == "signal" else 0),
        "seconds": None if found["seconds"] is None else float(found["seconds"]),
        "bytes_in": None if found["bytes_in"] is None else int(found["bytes_in"]),
        "bytes_out": None if found["bytes_out"] is None else int(found["bytes_out"]),
    }
    return json.dumps(session).encode() + b"\n"


def find_beginning(log: bytes) -> float:
    """The time of the oldest line, in seconds since the kernel's start; 0.0 where the kernel has lost none."""
    return next((line.time_s for line in parse_lines(log)), 0.0)


class SessionFollower:
    """Finds what is new in a log that is read again and again. The log may have lost its oldest lines meanwhile."""

    def __init__(self) -> None:
        self._last: KernelLine | None = None

    def take(self, log: bytes) -> Iterator[bytes]:
        """The sessions that the logs before did not have."""
        lines = list(parse_lines(log))
        for line in lines[self._find_new(lines) :]:
            yield render_line(line)
        if lines:
            self._last = lines[-1]

    def _find_new(self, lines: Sequence[KernelLine]) -> int:
        for number in range(len(lines), 0, -1):
            if lines[number - 1] == self._last:
                return number
        return 0
