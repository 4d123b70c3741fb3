"""What a cell gave: the result of each command, whose fault a bad one is, and the record that a run leaves. Pure.

docs/reference/files.md has the record's keys. A record is written again after each command, so it may be of a cell that
was killed: then its state is `running`, and the commands that it planned and has no result of did not run.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from vmkit.errors import ConfigError
from vmkit.junit import CaseVerdict
from vmkit.ktap.results import KtapResult
from vmkit.matrix.plan import Cell, GuestCommand

# Of the form below: results of another are refused.
SCHEMA = 1
Parsed = TypeVar("Parsed")
RUNNING, ENDED = "running", "ended"
# An error in the place of a command that has no result.
NOT_RUN = "did not run"
# Of a command's text, where the record of its cell has no room.
MAX_SHORT_TEXT = 1024
# Of a time since 1970: the year 9999, after which Python has no dates.
MAX_SECONDS = 253_402_300_799
# Tests and texts of a cell; more is no record of ours.
MAX_RECORD_BYTES = 64 << 20


class CellFault(StrEnum):
    """Whose fault a result is. A panic under a command is the test's: a matrix tests kernels."""

    NONE = "none"
    TEST = "test"
    TIME = "time"
    MACHINE = "machine"


# Statuses of `vmkit matrix run`: 124 is timeout(1)'s, 125 git's and docker's for what says nothing of the test. The
# first one that a run has decides: only `machine` may be another the next time.
STATUSES = {CellFault.TEST: 1, CellFault.TIME: 124, CellFault.MACHINE: 125, CellFault.NONE: 0}


def pick_fault(faults: Iterable[CellFault]) -> CellFault:
    """Returns the fault that decides the status of several results."""
    found = set(faults)
    return next((fault for fault in STATUSES if fault in found), CellFault.NONE)


def name_verdict(fault: CellFault, commands: Sequence[CaseVerdict]) -> str:
    """Returns what reports say of a cell that has ended, in a word or two."""
    if fault is CellFault.NONE:
        is_skipped = bool(commands) and all(verdict is CaseVerdict.SKIPPED for verdict in commands)
        return "skipped" if is_skipped else "passed"
    return {CellFault.TEST: "failed", CellFault.TIME: "timed out", CellFault.MACHINE: "machine failed"}[fault]


@dataclass(frozen=True, slots=True)
class CellResult:
    """The result of one command of one cell. failed: the command's status was not 0; error: it could not be run;
    skipped: the host cannot do this. text: its output, or why there is none. brief and text have no control
    characters that change a terminal. tests: the results that it printed, if the matrix asks for them; then it has
    failed if one of them has.
    """

    cell: Cell
    command: GuestCommand
    verdict: CaseVerdict
    seconds: float
    brief: str
    text: str = ""
    tests: tuple[KtapResult, ...] = ()
    fault: CellFault = CellFault.NONE


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """As CellResult, without the cell."""

    name: str
    verdict: CaseVerdict
    fault: CellFault
    seconds: float
    brief: str
    text: str = ""
    tests: tuple[KtapResult, ...] = ()


@dataclass(frozen=True, slots=True)
class EarlierAttempt:
    """An attempt at the same cell that did not decide it. seconds: None if it was killed."""

    attempt: int
    fault: str
    brief: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class CellRecord:
    """What one attempt at a cell gave so far. number: of the cell in its matrix, from 0. matrix: the digest of that.

    content: the digest of its image and kernel as they were here. planned: the names of its commands. machine: what it
    ran on, once it was ready. started: in seconds since 1970, by the clock of its host, which nothing is ordered by.
    """

    matrix: str
    number: int
    cell: str
    image: str
    kernel: str
    backend: str
    architecture: str
    planned: tuple[str, ...]
    vmkit: str
    host: str
    started: float
    attempt: int = 1
    earlier: tuple[EarlierAttempt, ...] = ()
    state: str = RUNNING
    seconds: float = 0.0
    machine: Mapping[str, Any] | None = None
    commands: tuple[CommandRecord, ...] = ()
    content: str = ""

    @property
    def is_ended(self) -> bool:
        return self.state == ENDED

    @property
    def fault(self) -> CellFault:
        """Of an attempt that was killed: the machine's."""
        faults = [command.fault for command in self.commands]
        return pick_fault(faults if self.is_ended else [*faults, CellFault.MACHINE])

    @property
    def verdict(self) -> str:
        """`passed`, `failed`, `timed out`, `machine failed`, `skipped`, or `killed`."""
        if not self.is_ended:
            return "killed"
        return name_verdict(self.fault, [command.verdict for command in self.commands])

    @property
    def brief(self) -> str:
        """Why it did not pass, in a line; empty if it did."""
        if not self.is_ended:
            return "the run ended before the cell did"
        bad = [one for one in self.commands if one.fault is self.fault is not CellFault.NONE]
        return f"{bad[0].name}: {bad[0].brief}" if bad else ""

    @property
    def is_decided(self) -> bool:
        """Whether running it again can tell nothing else. A failed machine, and a kill, say nothing of the test."""
        return self.is_ended and self.fault is not CellFault.MACHINE

    def as_earlier(self) -> EarlierAttempt:
        """The line that the next attempt has about this one."""
        fault = str(self.fault) if self.is_ended else "killed"
        return EarlierAttempt(self.attempt, fault, self.brief, self.seconds if self.is_ended else None)


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """What a folder of results has of its matrix: the digest, and the names of its cells and their commands."""

    matrix: str
    cells: tuple[str, ...]
    commands: tuple[str, ...]
    is_fresh: bool

    def list_commands(self, cell: str) -> tuple[str, ...]:
        """The names of a cell's commands."""
        return (cell.rpartition("/")[2],) if self.is_fresh else self.commands

    def render(self) -> bytes:
        """The content of plan.json."""
        value = {
            "schema": SCHEMA,
            "matrix": self.matrix,
            "fresh": self.is_fresh,
            "commands": self.commands,
            "cells": self.cells,
        }
        return json.dumps(value).encode() + b"\n"


def parse_plan(data: bytes, place: str) -> PlanRecord:
    """Reads the content of plan.json. Raises ConfigError as parse_record does."""
    return _parse(data, place, "is damaged", _read_plan)


def _read_plan(value: Mapping[str, Any]) -> PlanRecord:
    return PlanRecord(
        _text(value, "matrix"),
        tuple(map(str, value["cells"])),
        tuple(map(str, value["commands"])),
        is_fresh=bool(value["fresh"]),
    )


def make_command_record(result: CellResult) -> CommandRecord:
    """Returns what the record has of a command's result."""
    return CommandRecord(
        result.command.name, result.verdict, result.fault, result.seconds, result.brief, result.text, result.tests
    )


def render_record(record: CellRecord) -> bytes:
    """Returns the content of results.json."""
    value = {
        "schema": SCHEMA,
        "cell": record.cell,
        "number": record.number,
        "state": record.state,
        "verdict": record.verdict,
        "status": STATUSES[record.fault],
        "brief": record.brief,
        "seconds": round(record.seconds, 3),
        "attempt": record.attempt,
        "earlier": [
            {"attempt": one.attempt, "fault": one.fault, "brief": one.brief, "seconds": one.seconds}
            for one in record.earlier
        ],
        "image": record.image,
        "kernel": record.kernel,
        "backend": record.backend,
        "architecture": record.architecture,
        "matrix": record.matrix,
        "content": record.content,
        "vmkit": record.vmkit,
        "host": record.host,
        "started": round(record.started, 3),
        "machine": record.machine,
        "planned": list(record.planned),
        "commands": [_render_command(command) for command in record.commands],
    }
    return json.dumps(value, indent=1).encode() + b"\n"


def fit_record(record: CellRecord, max_bytes: int = MAX_RECORD_BYTES) -> tuple[CellRecord, bytes]:
    """Returns a record that parse_record's callers take, and its content.

    A guest prints what it likes. What has no room goes: first the logs of tests that passed, then those of all, then
    the tests. The result of each command stays.
    """
    *shorter, shortest = (lambda one: one), _drop_passed_logs, _drop_logs, _drop_tests
    for shorten in shorter:
        short = replace(record, commands=tuple(map(shorten, record.commands)))
        # JSON is longer still. A deep tree of tests may not fit into memory.
        if _measure(short) <= max_bytes and len(data := render_record(short)) <= max_bytes:
            return short, data
    short = replace(record, commands=tuple(map(shortest, record.commands)))
    return short, render_record(short)


def _measure(record: CellRecord) -> int:
    """The characters of all texts, about."""
    return sum(
        len(command.text) + sum(len(test.brief) + len(test.log) + sum(map(len, test.path)) for test in command.tests)
        for command in record.commands
    )


def _drop_passed_logs(command: CommandRecord) -> CommandRecord:
    return replace(command, tests=tuple(test if test.is_bad else replace(test, log="") for test in command.tests))


def _drop_logs(command: CommandRecord) -> CommandRecord:
    return replace(command, tests=tuple(replace(test, log="") for test in command.tests))


def _drop_tests(command: CommandRecord) -> CommandRecord:
    if not command.tests:
        return replace(command, text=command.text[-MAX_SHORT_TEXT:])
    text = f"vmkit left out the results of {len(command.tests)} tests: they have no room in the record of the cell"
    return replace(command, tests=(), text=text)


def _render_command(command: CommandRecord) -> dict[str, Any]:
    return {
        "name": command.name,
        "verdict": command.verdict,
        "fault": command.fault,
        "seconds": round(command.seconds, 3),
        "brief": command.brief,
        "text": command.text,
        "tests": [
            {"path": list(test.path), "verdict": test.verdict, "brief": test.brief, "log": test.log}
            for test in command.tests
        ],
    }


def parse_record(data: bytes, place: str) -> CellRecord:
    """Reads the content of results.json. place: its path, for errors.

    Raises ConfigError for a record that is damaged, or has the form of another version.
    """
    return _parse(data, place, "has no results of a cell", _read_record)


def _parse(data: bytes, place: str, trouble: str, read: Callable[[Mapping[str, Any]], Parsed]) -> Parsed:
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or not isinstance(value["schema"], int):
            raise TypeError("it is no object with a schema")
        if value["schema"] != SCHEMA:
            raise ConfigError(
                f"{place} is of form {value['schema']}, and this vmkit reads form {SCHEMA}",
                hint="use the vmkit that wrote it",
            )
        return read(value)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{place} {trouble}: {reason}", hint="move it away; what it is of runs again") from error


def _read_record(value: Mapping[str, Any]) -> CellRecord:
    state = value["state"]
    if state not in (RUNNING, ENDED):
        raise ValueError(f"the state is {state!r}")
    texts = {key: _text(value, key) for key in ("matrix", "cell", "image", "kernel", "backend", "architecture")}
    machine = value["machine"]
    planned = tuple(map(str, value["planned"]))
    commands = tuple(_read_command(one) for one in value["commands"])
    if state == ENDED and not {command.name for command in commands} >= set(planned):
        raise ValueError("it has ended, and a command has no result")
    return CellRecord(
        **texts,
        number=int(value["number"]),
        planned=planned,
        vmkit=_text(value, "vmkit"),
        host=_text(value, "host"),
        started=_seconds(value, "started"),
        attempt=int(value["attempt"]),
        earlier=tuple(_read_earlier(one) for one in value["earlier"]),
        state=state,
        seconds=_seconds(value, "seconds"),
        machine=None if machine is None else dict(machine),
        commands=commands,
        content=_text(value, "content"),
    )


def _read_earlier(value: Mapping[str, Any]) -> EarlierAttempt:
    seconds = None if value["seconds"] is None else _seconds(value, "seconds")
    return EarlierAttempt(int(value["attempt"]), str(value["fault"]), str(value["brief"]), seconds)


def _read_command(value: Mapping[str, Any]) -> CommandRecord:
    return CommandRecord(
        _text(value, "name"),
        CaseVerdict(value["verdict"]),
        CellFault(value["fault"]),
        _seconds(value, "seconds"),
        _text(value, "brief"),
        _text(value, "text"),
        tuple(
            KtapResult(
                tuple(map(str, test["path"])), CaseVerdict(test["verdict"]), str(test["brief"]), str(test["log"])
            )
            for test in value["tests"]
        ),
    )


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value[key]
    if not isinstance(found, str):
        raise TypeError(f"{key} is no text")
    return found


def _seconds(value: Mapping[str, Any], key: str) -> float:
    """JSON has no infinity, but Python's reader takes one."""
    found = float(value[key])
    if not 0 <= found <= MAX_SECONDS:
        raise ValueError(f"{key} is {found}")
    return found
