"""Renders results: JUnit's XML for CI, rows for a table, and the cells for GitHub Actions. Pure."""

import json
from collections.abc import Iterator, Sequence

from vmkit.junit import Case, CaseVerdict, render_junit
from vmkit.ktap.results import make_case
from vmkit.matrix.plan import Cell
from vmkit.matrix.results import NOT_RUN, CellRecord, CellResult, CommandRecord, make_command_record

SUITE = "vmkit matrix"
COLUMNS = ("IMAGE", "KERNEL", "BACKEND", "ARCH", "COMMAND", "RESULT", "SECONDS")


def render_report(outcomes: Sequence[CellResult]) -> bytes:
    """Returns JUnit's XML: one suite with a case for each command of each cell, whose classname is the cell.

    Behind a command come the tests whose results it printed. Cell, command and the tests around are their classname.
    """
    cases = (
        case for outcome in outcomes for case in make_command_cases(outcome.cell.name, make_command_record(outcome))
    )
    return render_junit(SUITE, cases)


def render_record_report(record: CellRecord) -> bytes:
    """As render_report, for a cell that may be running: a command that has no result yet is an error."""
    return render_junit(SUITE, make_record_cases(record))


def make_record_cases(record: CellRecord) -> Iterator[Case]:
    """Returns the cases of one cell. No command is missing, whenever its run was killed."""
    for command in record.commands:
        yield from make_command_cases(record.cell, command)
    brief = NOT_RUN if record.is_ended else f"{NOT_RUN}: {record.brief}"
    known = {command.name for command in record.commands}
    for name in record.planned:
        if name not in known:
            yield Case(make_classname(record.cell), name, CaseVerdict.ERROR, brief)


def make_command_cases(cell: str, command: CommandRecord) -> Iterator[Case]:
    """Returns the case of a command, and those of its tests."""
    classname = make_classname(cell)
    yield Case(classname, command.name, command.verdict, command.brief, command.text, command.seconds)
    for test in command.tests:
        yield make_case(test, f"{classname}.{command.name}")


def make_classname(cell: str) -> str:
    """Returns what JUnit has for the cell of that name: a dot is the next folder there."""
    return cell.replace("/", ".")


def render_rows(outcomes: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """Returns a row for each result, for COLUMNS."""
    return [
        (
            outcome.cell.image,
            "own" if outcome.cell.kernel is None else outcome.cell.kernel.name,
            outcome.cell.backend,
            outcome.cell.architecture,
            outcome.command.name,
            outcome.verdict if outcome.verdict is CaseVerdict.PASSED else f"{outcome.verdict}: {outcome.brief}",
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
    ]


def render_github(cells: Sequence[Cell]) -> str:
    """Returns a line for $GITHUB_OUTPUT: the value of a job's strategy.matrix, with an entry for each cell."""
    return "matrix=" + json.dumps({"include": [{"cell": cell.name} for cell in cells]})
