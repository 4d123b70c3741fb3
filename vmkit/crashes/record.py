"""What is known of one crash, as a value and as its JSON. Pure.

A guest chooses most of the text. So it is cut here, and the programs that print it clean it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SCHEMA = 1
MAX_RECORD_BYTES = 256 * 1024
MAX_TEXT_CHARACTERS = 4096
MAX_WORDS = 32
# Of a service's log.
MAX_LINES, MAX_LINE_CHARACTERS = 20, 500
# What the kernel puts behind the path of a program that was removed.
DELETED = " (deleted)"
# A folder's name, and so a number that a person can type.
MAX_DIGITS = 9


class CrashKind(StrEnum):
    """What crashed."""

    # The guest's kernel.
    PANIC = "panic"
    # A program in it.
    CORE = "core"
    # A service of its systemd, without a core.
    SERVICE = "service"


class ServiceEnd(StrEnum):
    """How the main process of a service ended. UNKNOWN: there was none, or it has not ended."""

    UNKNOWN = "unknown"
    EXITED = "exited"
    KILLED = "killed"
    DUMPED = "dumped"


class DumpFormat(StrEnum):
    """The formats of a dump of the guest's memory."""

    ELF = "elf"
    KDUMP = "kdump"


@dataclass(frozen=True, slots=True)
class Program:
    """A program that a signal ended, as the guest told of it.

    pid, uid, gid: in the guest's first namespaces. exe: its path, where bytes that are no UTF-8 are surrogates (PEP
    383). is_contained: it has another PID namespace than vshd. is_whole: the core is.
    """

    pid: int
    uid: int
    gid: int
    signal: int
    name: str
    command: tuple[str, ...]
    exe: str
    cgroup: str
    is_contained: bool
    is_whole: bool


@dataclass(frozen=True, slots=True)
class FailedService:
    """A service that failed, as the guest's systemd told of it.

    result: systemd's word, such as exit-code or timeout. end, status, pid: of the main process; the status is its exit
    status, or the signal that ended it. invocation: the id of this run of the service, as hexadecimal digits. time_s:
    when, by the guest's clock. restarts: how often systemd has started it again. is_restarted: it does so once more.
    log: the last lines of its log, as far as the host had them.
    """

    unit: str
    result: str
    end: ServiceEnd
    status: int
    pid: int
    invocation: str
    time_s: int
    restarts: int
    is_restarted: bool
    log: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Crash:
    """One crash of a guest.

    at_s: when, in seconds since 1970. brief: what happened, for a person. kernel: its release; "": unknown.
    image, digest: what the machine was made of. dump: the format of the dump of the guest's memory; None: there is
    none. dump_bytes: its size. trouble: why something of it is missing; "": nothing is. vmlinux: the kernel with its
    symbols, on this host; "": unknown. program: of a CORE. root: the disk or folder of this host that the guest's root
    is; "": it is the image's. service: of a SERVICE, and of a CORE that made one fail.
    """

    kind: CrashKind
    at_s: float
    brief: str
    image: str = ""
    digest: str = ""
    kernel: str = ""
    dump: DumpFormat | None = None
    dump_bytes: int = 0
    trouble: str = ""
    vmlinux: str = ""
    program: Program | None = None
    root: str = ""
    service: FailedService | None = None


def render_crash(crash: Crash) -> dict[str, object]:
    """The crash as JSON has it."""
    return {
        "schema": SCHEMA,
        "kind": crash.kind.value,
        "at": round(crash.at_s, 3),
        "brief": _cut(crash.brief),
        "image": crash.image,
        "digest": crash.digest,
        "kernel": _cut(crash.kernel),
        "dump": None if crash.dump is None else crash.dump.value,
        "dump_bytes": crash.dump_bytes,
        "trouble": _cut(crash.trouble),
        "vmlinux": crash.vmlinux,
        "root": crash.root,
        "program": None if crash.program is None else _render_program(crash.program),
        "service": None if crash.service is None else _render_service(crash.service),
    }


def parse_crash(value: object) -> Crash:
    """A crash from its JSON. Raises ValueError for what is none."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        raise ValueError(f"it is no record of a crash of version {SCHEMA}")
    dump = _take(value, "dump", str | None)
    return Crash(
        kind=CrashKind(_take(value, "kind", str)),
        at_s=float(_take(value, "at", int | float)),
        dump=None if dump is None else DumpFormat(dump),
        dump_bytes=_take(value, "dump_bytes", int),
        program=_parse_program(value.get("program")),
        **{key: _take(value, key, str) for key in ("brief", "image", "digest", "kernel", "trouble", "vmlinux")},
        # Records of earlier versions lack it.
        root=_take(value, "root", str) if "root" in value else "",
        service=_parse_service(value.get("service")),
    )


def _render_program(program: Program) -> dict[str, object]:
    return {
        "pid": program.pid,
        "uid": program.uid,
        "gid": program.gid,
        "signal": program.signal,
        "name": _cut(program.name),
        "command": [_cut(word) for word in program.command[:MAX_WORDS]],
        "exe": _cut(program.exe),
        "cgroup": _cut(program.cgroup),
        "contained": program.is_contained,
        "whole": program.is_whole,
    }


def _parse_program(value: object) -> Program | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("its 'program' is of another kind")
    words = _take(value, "command", list)
    if not all(isinstance(word, str) for word in words):
        raise ValueError("its 'command' is of another kind")
    if not isinstance(value.get("contained"), bool) or not isinstance(value.get("whole"), bool):
        raise ValueError("its 'program' is of another kind")
    return Program(
        **{key: _take(value, key, int) for key in ("pid", "uid", "gid", "signal")},
        **{key: _take(value, key, str) for key in ("name", "exe", "cgroup")},
        command=tuple(words),
        is_contained=value["contained"],
        is_whole=value["whole"],
    )


def _render_service(service: FailedService) -> dict[str, object]:
    return {
        "unit": _cut(service.unit),
        "result": _cut(service.result),
        "end": service.end.value,
        "status": service.status,
        "pid": service.pid,
        "invocation": service.invocation,
        "time": service.time_s,
        "restarts": service.restarts,
        "restarted": service.is_restarted,
        "log": [line[:MAX_LINE_CHARACTERS] for line in service.log[-MAX_LINES:]],
    }


def _parse_service(value: object) -> FailedService | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("its 'service' is of another kind")
    lines = _take(value, "log", list)
    if not all(isinstance(line, str) for line in lines) or not isinstance(value.get("restarted"), bool):
        raise ValueError("its 'service' is of another kind")
    return FailedService(
        **{key: _take(value, key, str) for key in ("unit", "result", "invocation")},
        **{key: _take(value, key, int) for key in ("status", "pid", "restarts")},
        end=ServiceEnd(_take(value, "end", str)),
        time_s=_take(value, "time", int),
        is_restarted=value["restarted"],
        log=tuple(lines),
    )


def _take(value: Mapping[str, Any], key: str, kind: Any) -> Any:
    found = value.get(key)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ValueError(f"its '{key}' is of another kind")
    return found


def _cut(text: str) -> str:
    return text[:MAX_TEXT_CHARACTERS]
