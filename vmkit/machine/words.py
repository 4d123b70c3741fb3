"""What a verb can ask of a machine's monitor: requests and answers as values, and their JSON lines, for both ends.

A connection carries lines. The asker sends requests, `{"version": 1, "do": "quit", ...}`, and gets one answer for each,
`{"ok": true, ...}` or `{"error": "...", "hint": "..."}`. When the machine ends, everyone connected gets one last line,
`{"end": REASON, "brief": "...", "expected": BOOL}`, and the connection closes. When its guest reboots, everyone gets
`{"reboot": COUNT}`.

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
    """Only waits for the last line."""


@dataclass(frozen=True, slots=True)
class ExpectEnd:
    """An end from now on was asked for: it is no failure."""


@dataclass(frozen=True, slots=True)
class Quit:
    """End the machine now. by: who asked, for the event log."""

    by: str = ""


@dataclass(frozen=True, slots=True)
class TakeKernelLog:
    """Read the kernel's log in the guest's memory, and write it to Layout.KERNEL_LOG."""


@dataclass(frozen=True, slots=True)
class TakeSyslog:
    """Fetch all that the guest has logged until now, and write it to Layout.SYSLOG."""


@dataclass(frozen=True, slots=True)
class Save:
    """Save the machine into a folder, and end it: its end is then `saved`."""

    folder: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """Stop the guest's processors until a Resume. A paused machine can be paused again."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Let a paused guest run, and set its clock. The answer has `late_ms`, or `why` the clock could not be set."""


@dataclass(frozen=True, slots=True)
class MeasureClock:
    """Compare the guest's clock with the host's. The answer has `ahead_ms`, right to `error_ms`."""


@dataclass(frozen=True, slots=True)
class Park:
    """Pause the machine for a pool: nothing but a Take lets it run."""


@dataclass(frozen=True, slots=True)
class Take:
    """Let a parked machine run, as the asker's own. owner: the process id that it ends with; 0: none.

    From then on the machine does not end with the process that started it.
    """

    owner: int = 0


@dataclass(frozen=True, slots=True)
class Disown:
    """The machine goes on when the process that it belongs to ends."""


@dataclass(frozen=True, slots=True)
class PlugFolder:
    """Plug a virtiofs device that a process of the asker's serves. It is taken out at the end of that process.

    socket: the path at which the process takes one connection. tag: the device's name in the guest. owner: the
    process's id.
    """

    socket: str
    tag: str
    owner: int


@dataclass(frozen=True, slots=True)
class UnplugFolder:
    """Take the device of this tag out."""

    tag: str


FolderRequest = PlugFolder | UnplugFolder
PauseRequest = Pause | Resume | MeasureClock | Park | Take
Request = Watch | ExpectEnd | Quit | TakeKernelLog | TakeSyslog | Save | Disown | PauseRequest | FolderRequest

# The reason of the end that a Save asks for.
SAVED = "saved"
# The words on the wire, one each.
REQUESTS: dict[str, type[Request]] = {
    "watch": Watch,
    "expect-end": ExpectEnd,
    "quit": Quit,
    "take-kernel-log": TakeKernelLog,
    "take-syslog": TakeSyslog,
    "save": Save,
    "pause": Pause,
    "resume": Resume,
    "measure-clock": MeasureClock,
    "park": Park,
    "take": Take,
    "disown": Disown,
    "plug-folder": PlugFolder,
    "unplug-folder": UnplugFolder,
}
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


@dataclass(frozen=True, slots=True)
class Rebooted:
    """The guest boots again. count: its reboots until now."""

    count: int


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


def render_reboot(rebooted: Rebooted) -> bytes:
    """The line for everyone connected."""
    return _render({"reboot": rebooted.count})


def parse_answer(line: bytes) -> Answer | Ended | Rebooted | None:
    """Returns what a monitor's line says; None for a line that says nothing that is known here."""
    value = _parse(line)
    if value is None:
        return None
    if isinstance(count := value.get("reboot"), int):
        return Rebooted(count)
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
