"""Renders results: JUnit's XML for CI, rows for a table, and the cells for GitHub Actions. Pure."""

import json
from collections.abc import Sequence

from vmkit.junit import Case, CaseVerdict, render_junit
from vmkit.matrix.execute import CellResult
from vmkit.matrix.plan import Cell

COLUMNS = ("IMAGE", "KERNEL", "BACKEND", "COMMAND", "RESULT", "SECONDS")


def render_report(outcomes: Sequence[CellResult]) -> bytes:
    """Returns JUnit's XML: one suite with a case for each command of each cell. Its classname is the cell."""
    return render_junit("vmkit matrix", map(_make_case, outcomes))


def _make_case(outcome: CellResult) -> Case:
    return Case(
        outcome.cell.name.replace("/", "."),
        outcome.command.name,
        outcome.verdict,
        outcome.brief,
        outcome.text,
        outcome.seconds,
    )


def render_rows(outcomes: Sequence[CellResult]) -> list[tuple[str, ...]]:
    """Returns a row for each result, for COLUMNS."""
    return [
        (
            outcome.cell.image,
            "own" if outcome.cell.kernel is None else outcome.cell.kernel.name,
            outcome.cell.backend,
            outcome.command.name,
            outcome.verdict if outcome.verdict is CaseVerdict.PASSED else f"{outcome.verdict}: {outcome.brief}",
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
    ]


def render_github(cells: Sequence[Cell]) -> str:
    """Returns a line for $GITHUB_OUTPUT: the value of a job's strategy.matrix, with an entry for each cell."""
    return "matrix=" + json.dumps({"include": [{"cell": cell.name} for cell in cells]})
