"""The folder that a cell writes: its record, its JUnit file and its logs. A kill at any moment leaves whole files.

    RESULTS/plan.json            the names of all cells: a merge finds by them what did not run
    RESULTS/000003/results.json  the record, written anew after each command
    RESULTS/000003/junit.xml     the same for CI; commands that have no result yet are errors
    RESULTS/000003/console.log   and events.jsonl, kernel.log, sessions.jsonl: the machine's, after each command
    RESULTS/000003/attempt-1/    the files of an attempt that a kill or a failure of the machine ended
    RESULTS/000003/lock          held while a process runs the cell

Every file is written under another name, synced and renamed. So a file is the old one or the new one.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.machine.running import read_log
from vmkit.machine.sessions import render_sessions
from vmkit.matrix.plan import Matrix
from vmkit.matrix.reading import open_file
from vmkit.matrix.report import render_record_report
from vmkit.matrix.results import (
    ENDED,
    MAX_RECORD_BYTES,
    CellRecord,
    CellResult,
    PlanRecord,
    fit_record,
    make_command_record,
    parse_plan,
    parse_record,
)

PLAN, RECORD, REPORT, LOCK = "plan.json", "results.json", "junit.xml", "lock"
# The logs of a machine that a cell keeps, by their kinds.
LOGS = {"console": "console.log", "events": "events.jsonl", "kernel": "kernel.log"}
SESSIONS = "sessions.jsonl"
NEW_SUFFIX = ".new"
# 100,000 names of cells.
MAX_PLAN_BYTES = 32 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_results(folder: Path, matrix: Matrix) -> None:
    """Makes a folder of results, or checks that it is of this matrix. Several jobs may do so at once.

    Raises ConfigError for the results of another matrix, HostError for a folder that cannot be written.
    """
    wanted = PlanRecord(
        matrix.digest,
        tuple(cell.name for cell in matrix.cells),
        tuple(dict.fromkeys(command.name for cell in matrix.cells for command in cell.commands)),
        is_fresh=matrix.cells[0].is_fresh,
    )
    with explain_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = read_plan(folder)
        if found is None:
            write_whole(folder / PLAN, wanted.render())
        elif found.matrix != wanted.matrix:
            raise ConfigError(
                f"{folder} has results of another matrix, or of this one before it was changed",
                hint="write into another directory: --to DIR",
            )


def read_plan(folder: Path) -> PlanRecord | None:
    """Returns the plan of the matrix that a folder has results of. None: it is no such folder.

    Raises ConfigError for a plan that is damaged or of another version, OSError.
    """
    try:
        with open_file(folder / PLAN) as file:
            data = file.read(MAX_PLAN_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return parse_plan(data, str(folder / PLAN))


def read_record(folder: Path) -> CellRecord | None:
    """Returns the record in a cell's folder. None: there is none yet. Raises ConfigError, OSError."""
    path = folder / RECORD
    try:
        with open_file(path) as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_RECORD_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_RECORD_BYTES >> 20} MiB")
    return parse_record(data, str(path))


def name_folder(number: int) -> str:
    """Returns the name of a cell's folder. They sort as the cells."""
    return f"{number:06}"


class CellFolder:
    """The folder of one cell, which no other process writes. Invariant: its files are whole, and belong together."""

    def __init__(self, folder: Path, previous: CellRecord | None) -> None:
        self._folder = folder
        # Of the last attempt, here or on another node.
        self.previous = previous
        self._record: CellRecord | None = None

    @property
    def attempt(self) -> int:
        """The number of the attempt that began last."""
        return self._require().attempt

    def begin(self, record: CellRecord) -> None:
        """Starts an attempt: what the last one left moves aside."""
        previous = self.previous
        with explain_errors(self._folder):
            # A kill may have left one.
            for path in self._folder.glob(f".*{NEW_SUFFIX}"):
                path.unlink(missing_ok=True)
            if previous is not None:
                self._put_aside(previous.attempt)
                # What ran another image or kernel is no attempt at this.
                is_same = previous.content == record.content
                earlier = (*previous.earlier, previous.as_earlier()) if is_same else ()
                record = replace(record, attempt=previous.attempt + 1, earlier=earlier)
            self._write(record)

    def set_machine(self, facts: dict[str, object]) -> None:
        """Takes what is known of the machine once it is ready."""
        self._write(replace(self._require(), machine=facts))

    def add(self, result: CellResult, seconds: float) -> None:
        """Takes the result of a command. seconds: since the attempt began."""
        record = self._require()
        commands = (*record.commands, make_command_record(result))
        self._write(replace(record, commands=commands, seconds=seconds))

    def end(self, seconds: float) -> None:
        """Ends the attempt: it has all results that it can have."""
        self._write(replace(self._require(), state=ENDED, seconds=seconds))

    def keep_logs(self, source: Path) -> None:
        """Copies the logs of a machine. A full disk loses logs, and no results."""
        for kind, name in LOGS.items():
            with contextlib.suppress(OSError, MachineError):
                data = b"".join(read_log(source, kind))
                write_whole(self._folder / name, data)
                if kind == "kernel":
                    write_whole(self._folder / SESSIONS, render_sessions(data))

    def _put_aside(self, attempt: int) -> None:
        """Moves the files of an attempt. The record is copied: until the next one is there it stays the cell's."""
        aside = self._folder / f"attempt-{attempt}"
        aside.mkdir(exist_ok=True)
        for name in (*LOGS.values(), SESSIONS):
            with contextlib.suppress(FileNotFoundError):
                (self._folder / name).replace(aside / name)
        for name in (REPORT, RECORD):
            with contextlib.suppress(FileNotFoundError):
                write_whole(aside / name, (self._folder / name).read_bytes())

    def _write(self, record: CellRecord) -> None:
        self._record, data = fit_record(record)
        with explain_errors(self._folder):
            write_whole(self._folder / REPORT, render_record_report(self._record))
            write_whole(self._folder / RECORD, data)

    def _require(self) -> CellRecord:
        assert self._record is not None, "begin() comes first"
        return self._record


@contextlib.contextmanager
def open_cell(results: Path, number: int) -> Iterator[CellFolder]:
    """The folder of a cell, locked for this process. Raises HostError when another one runs that cell there."""
    folder = results / name_folder(number)
    with contextlib.ExitStack() as stack:
        with explain_errors(folder):
            folder.mkdir(exist_ok=True)
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise HostError(
                    f"another process runs cell {number} and writes {folder}",
                    hint="wait for it, or write into another directory: --to DIR",
                ) from error
            previous = read_record(folder)
        yield CellFolder(folder, previous)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, and a power cut, find the old content or the new. Raises OSError."""
    # Processes of two nodes may have one pid.
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{NEW_SUFFIX}")
    try:
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explain_errors(folder: Path, hint: str = "name a directory that you can write: --to DIR") -> Iterator[None]:
    """Turns an OSError of the block into a HostError. hint: what to do, other than to make room."""
    try:
        yield
    except OSError as error:
        brief = f"cannot write to {folder}: {error.strerror}"
        raise HostError(brief, hint="make room there" if error.errno in _FULL else hint) from error
