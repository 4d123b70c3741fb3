"""What a verb can ask of a machine's monitor: requests and answers as values, and their JSON lines, for both ends.

A connection carries lines. The asker sends requests, `{"version": 1, "do": "quit", ...}`, and gets one answer for each,
`{"ok": true, ...}` or `{"error": "...", "hint": "..."}`. When the machine ends, everyone connected gets one last line,
`{"end": REASON, "brief": "...", "expected": BOOL}`, and the connection closes.

A request is a row of REQUESTS: a frozen dataclass whose fields are the request's arguments. Its fields are checked, so
that the monitor never sees an argument of another type. Pure.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

# Raised when the meaning of a request changes; a monitor refuses the requests of another version.
VERSION = 1
MAX_REQUEST_LINE_BYTES = 4096
MAX_ANSWER_LINE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Watch:
    """Only listen: the asker wants the last line."""


@dataclass(frozen=True, slots=True)
class ExpectEnd:
    """An end from now on was asked for: it is no failure."""


@dataclass(frozen=True, slots=True)
class Quit:
    """End the machine now. by: who asked, for the event log."""

    by: str = ""


Request = Watch | ExpectEnd | Quit

# The words on the wire, one each.
REQUESTS: dict[str, type[Request]] = {"watch": Watch, "expect-end": ExpectEnd, "quit": Quit}
_NAMES = {kind: name for name, kind in REQUESTS.items()}
_KINDS = {"str": str, "int": int, "bool": bool, "float": float}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the monitor answers to one request. values: what was asked for, by name."""

    ok: bool
    error: str = ""
    hint: str = ""
    values: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a machine ended: the reason in one word, a line for a person, and whether it was asked for."""

    reason: str
    brief: str
    expected: bool


class WordError(Exception):
    """A line is no request of this version; the text is for the asker."""


def name_of(request: Request) -> str:
    """The request's word on the wire."""
    return _NAMES[type(request)]


def render_request(request: Request) -> bytes:
    """The request as its line."""
    return _render({"version": VERSION, "do": name_of(request), **asdict(request)})


def parse_request(line: bytes) -> Request:
    """The request of a line. Raises WordError."""
    value = _parse(line)
    if value is None or not isinstance(value.get("do"), str):
        raise WordError("this line is no request")
    if value.get("version") != VERSION:
        raise WordError(f"this monitor speaks version {VERSION} of the requests, not {value.get('version')!r}")
    kind = REQUESTS.get(str(value["do"]))
    if kind is None:
        raise WordError(f"this monitor knows no request '{value['do']}'")
    arguments: dict[str, Any] = {name: inner for name, inner in value.items() if name not in ("version", "do")}
    for row in fields(kind):
        if row.name not in arguments:
            if row.default is MISSING:
                raise WordError(f"the request '{value['do']}' lacks '{row.name}'")
            continue
        wanted = _KINDS[str(row.type)] if isinstance(row.type, str) else row.type
        if type(arguments[row.name]) is not wanted:
            raise WordError(f"'{row.name}' of the request '{value['do']}' has another type")
    unknown = arguments.keys() - {row.name for row in fields(kind)}
    if unknown:
        raise WordError(f"the request '{value['do']}' has no '{min(unknown)}'")
    return kind(**arguments)


def render_answer(answer: Answer) -> bytes:
    """The answer as its line."""
    if answer.ok:
        return _render({"ok": True, **answer.values})
    return _render({"error": answer.error} | ({"hint": answer.hint} if answer.hint else {}))


def render_end(ended: Ended) -> bytes:
    """The last line of every connection."""
    return _render({"end": ended.reason, "brief": ended.brief, "expected": ended.expected})


def parse_answer(line: bytes) -> Answer | Ended | None:
    """What a monitor's line says; None for a line that is neither."""
    value = _parse(line)
    if value is None:
        return None
    if {"end", "brief", "expected"} <= value.keys():
        return Ended(str(value["end"]), str(value["brief"]), value["expected"] is True)
    if value.get("ok") is True:
        return Answer(True, values=MappingProxyType({name: v for name, v in value.items() if name != "ok"}))
    if "error" in value:
        return Answer(False, str(value["error"]), str(value.get("hint", "")))
    return None


def _render(value: Mapping[str, object]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _parse(line: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
