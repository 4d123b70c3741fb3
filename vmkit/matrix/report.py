"""Renders results: JUnit's XML for CI, rows for a table, and the cells for GitHub Actions. Pure."""

import json
from collections.abc import Iterator, Sequence

from vmkit.junit import Case, CaseVerdict, render_junit
from vmkit.ktap.results import make_case
from vmkit.matrix.execute import CellResult
from vmkit.matrix.plan import Cell

COLUMNS = ("IMAGE", "KERNEL", "BACKEND", "ARCH", "COMMAND", "RESULT", "SECONDS")


def render_report(outcomes: Sequence[CellResult]) -> bytes:
    """Returns JUnit's XML: one suite with a case for each command of each cell, whose classname is the cell.

    Behind a command come the tests whose results it printed. Cell, command and the tests around are their classname.
    """
    return render_junit("vmkit matrix", (case for outcome in outcomes for case in _make_cases(outcome)))


def _make_cases(outcome: CellResult) -> Iterator[Case]:
    cell, name = outcome.cell.name.replace("/", "."), outcome.command.name
    yield Case(cell, name, outcome.verdict, outcome.brief, outcome.text, outcome.seconds)
    for test in outcome.tests:
        yield make_case(test, f"{cell}.{name}")


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
