"""A merged result as text: a table of all cells, Markdown for a job of GitHub, and JSON for programs. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vmkit.errors import ConfigError
from vmkit.matrix.merge import GOOD, CellChange, Merged, MergedCell
from vmkit.matrix.results import SCHEMA, STATUSES
from vsh.text import clean_line
from vshd.wire.version import __version__

# GitHub takes 1 MiB for a step.
MAX_LISTED = 200
COLUMNS = ("CELL", "RESULT", "SECONDS", "RETRIES", "WHY")
MAX_BRIEF_CHARACTERS = 200
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|#"} | {"\n": " "})


def render_counts(counts: Mapping[str, int]) -> str:
    """Returns a line such as `6 cells: 4 passed, 2 failed`."""
    total = sum(counts.values())
    return f"{total} {'cell' if total == 1 else 'cells'}: " + ", ".join(
        f"{n} {verdict}" for verdict, n in counts.items()
    )


def make_row(cell: MergedCell) -> tuple[str, ...]:
    """Returns what COLUMNS has of a cell."""
    seconds = f"{cell.seconds:.1f}" if cell.found is not None else ""
    return cell.name, cell.verdict, seconds, str(cell.retries or ""), cell.brief[:MAX_BRIEF_CHARACTERS]


def render_table(merged: Merged) -> str:
    """Returns a line for each cell, in columns."""
    rows = [COLUMNS, *(tuple(map(clean_line, make_row(cell))) for cell in merged.cells)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(COLUMNS))]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def render_change(change: CellChange) -> str:
    """Returns a line such as `tiny/own/user: passed before, failed now`."""
    if change.before is None:
        return f"{change.cell}: new, {change.after}"
    if change.after is None:
        return f"{change.cell}: {change.before} before, not in the matrix now"
    return f"{change.cell}: {change.before} before, {change.after} now"


def list_notes(merged: Merged) -> Iterator[str]:
    """Yields what a reader must know beside the verdicts."""
    yield from merged.troubles
    for cell in merged.cells:
        if cell.others and cell.found is not None:
            yield f"{cell.name} has {1 + len(cell.others)} results, and {cell.found.place} counts"
    versions = sorted({cell.found.record.vmkit for cell in merged.cells if cell.found is not None})
    if len(versions) > 1:
        yield f"the cells are of different versions of vmkit: {', '.join(versions[:MAX_LISTED])}"


def render_markdown(merged: Merged) -> str:
    """Returns a page for $GITHUB_STEP_SUMMARY."""
    parts = [f"### Matrix: {render_counts(merged.counts)}"]
    if merged.bad:
        head = ["| cell | result | seconds | retries | why |", "| --- | --- | --- | --- | --- |"]
        rows = ["| " + " | ".join(_escape(text) for text in make_row(cell)) + " |" for cell in merged.bad[:MAX_LISTED]]
        parts.append("\n".join([*head, *rows]))
        parts += _more(merged.bad)
    again = [cell for cell in merged.cells if cell.retries and cell.verdict in GOOD]
    if again:
        parts.append(f"{len(again)} passed after a retry: {_join([cell.name for cell in again])}")
    if merged.changes:
        lines = [f"- {_escape(render_change(change))}" for change in merged.changes[:MAX_LISTED]]
        parts += ["Changes since the run before:", "\n".join(lines), *_more(merged.changes)]
    notes = list(list_notes(merged))
    if notes:
        parts += ["\n".join(f"- {_escape(note)}" for note in notes[:MAX_LISTED]), *_more(notes)]
    return "\n\n".join(parts) + "\n"


def _more(items: Sequence[object]) -> list[str]:
    return [f"And {len(items) - MAX_LISTED} more."] if len(items) > MAX_LISTED else []


def _join(names: Sequence[str]) -> str:
    some = ", ".join(map(_escape, names[:MAX_LISTED]))
    return some + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _escape(text: str) -> str:
    return text.translate(_MARKDOWN)


def render_merged(merged: Merged) -> bytes:
    """Returns the content of a merge's results.json, which --times and --before read."""
    value = {
        "schema": SCHEMA,
        "vmkit": __version__,
        "matrix": merged.plan.matrix,
        "status": STATUSES[merged.fault],
        "counts": merged.counts,
        "troubles": merged.troubles,
        "changes": None
        if merged.changes is None
        else [{"cell": one.cell, "before": one.before, "after": one.after} for one in merged.changes],
        "cells": [_render_cell(cell) for cell in merged.cells],
    }
    # A line for each cell would be nice for people; they have the table.
    return json.dumps(value).encode() + b"\n"


def _render_cell(cell: MergedCell) -> dict[str, Any]:
    record = None if cell.found is None else cell.found.record
    return {
        "cell": cell.name,
        "number": cell.number,
        "verdict": cell.verdict,
        "status": STATUSES[cell.fault],
        "brief": cell.brief,
        "seconds": None if record is None else round(record.seconds, 3),
        "attempts": 0 if record is None else len(record.earlier) + 1,
        "host": None if record is None else record.host,
        "directory": None if cell.found is None else cell.found.place,
        "commands": {} if record is None else {one.name: one.verdict for one in record.commands},
    }


def parse_merged(data: bytes, place: str) -> tuple[dict[str, str], dict[str, float]]:
    """Reads a merge's results.json: verdicts, and seconds of those that ended, by the names of the cells.

    Raises ConfigError for a file that is damaged, or of another version.
    """
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ConfigError(
                f"{place} is of form {value['schema']}, and this vmkit reads form {SCHEMA}",
                hint="use the vmkit that wrote it",
            )
        verdicts = {str(cell["cell"]): str(cell["verdict"]) for cell in value["cells"]}
        ended = [cell for cell in value["cells"] if cell["verdict"] in ("passed", "failed", "timed out")]
        return verdicts, {str(cell["cell"]): float(cell["seconds"]) for cell in ended}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{place} is no result of `vmkit matrix merge`") from error
