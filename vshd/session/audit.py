"""The audit log: a line for each session in the log of vshd, which docs/reference/files.md describes.

What a client wrote, the command, stands last. So no command can pass for the rest of a line, or for another line.
"""

import time

from vshd.log import fit

# Bytes that a line shows of a command, so that the end of the line is never cut off.
COMMAND_SHOWN_MAX = 200


def render_end(
    who: str, end: object, command: str, *, seconds: float, count: tuple[int, int] | None = None, now_s: float = 0.0
) -> str:
    """A session that ended. end: how, in vshd's words. count: bytes for the target and from it. now_s: since 1970."""
    passed = "" if count is None else f", {count[0]} bytes in, {count[1]} bytes out"
    since = _render_time((now_s or time.time()) - seconds)
    return f"{who}: {end} after {seconds:.3f} s{passed}, since {since}: {fit(command, COMMAND_SHOWN_MAX)}"


def render_refusal(who: str, command: str, reason: str, *, now_s: float = 0.0) -> str:
    """A session that did not begin."""
    since = _render_time(now_s or time.time())
    return f"{who}: refused, since {since}: {fit(command, COMMAND_SHOWN_MAX)}: {reason}"


def _render_time(at_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))
