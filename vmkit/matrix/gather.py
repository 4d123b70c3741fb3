"""Finds the results of cells below folders, and writes one merged result.

The texts of 10,000 cells may not fit into memory. Beyond a limit, a record is read twice: for its verdicts, and for
its texts when they are written.
"""

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from vmkit.errors import ConfigError, HostError
from vmkit.junit import render_junit_case, render_junit_end, render_junit_head
from vmkit.matrix.cellfolder import NEW_SUFFIX, explain_errors, read_plan, read_record, write_whole
from vmkit.matrix.kcidb import KcidbReport
from vmkit.matrix.merge import (
    Found,
    Merged,
    MergedCell,
    compare,
    count_cases,
    make_missing_cases,
    merge_records,
    strip_record,
)
from vmkit.matrix.page import render_page
from vmkit.matrix.reading import open_file
from vmkit.matrix.report import SUITE, make_record_cases
from vmkit.matrix.results import CellRecord, PlanRecord
from vmkit.matrix.summary import parse_merged, render_markdown, render_merged, render_table

# An engine puts the folder of each job into one of its own, and those into one of the run.
MAX_DEPTH = 4
MERGED = "results.json"
# Of texts in memory.
KEPT_BYTES = 64 << 20
# Of the other parts of a test and of a command.
_PART_BYTES = 500
MAX_MERGED_BYTES = 256 << 20
_CELL = re.compile(r"\d{6}")


def merge_folders(folders: Sequence[Path], before: Path | None = None, kept_bytes: int = KEPT_BYTES) -> Merged:
    """Reads all results below the folders. before: of an earlier merge. kept_bytes: of texts that stay in memory.

    Raises ConfigError where there are none, or where they are of two matrices.
    """
    plan: PlanRecord | None = None
    place = folders[0]
    found: list[Found] = []
    troubles: dict[int, str] = {}
    for folder in folders:
        results = list(_find_results(folder))
        if not results:
            raise ConfigError(f"{folder} has no results of a matrix", hint="name what --to of vmkit matrix run named")
        for one, its_plan in results:
            if plan is not None and plan.matrix != its_plan.matrix:
                raise ConfigError(
                    f"{place} and {one} have results of two matrices, or of one before and after a change",
                    hint="merge each on its own",
                )
            plan, place = its_plan, one
            for cell in _read_cells(one, troubles):
                kept_bytes -= _measure(cell)
                found.append(cell if kept_bytes > 0 else replace(cell, whole=None))
    assert plan is not None
    merged = merge_records(plan, found, troubles)
    if before is None:
        return merged
    verdicts, _ = read_merged(before)
    return Merged(merged.plan, merged.cells, merged.troubles, compare(verdicts, merged.cells))


def read_merged(folder: Path) -> tuple[dict[str, str], dict[str, float]]:
    """Reads the verdicts and the seconds of an earlier merge. Raises ConfigError."""
    path = folder / MERGED
    try:
        with open_file(path) as file:
            data = file.read(MAX_MERGED_BYTES + 1)
    except OSError as error:
        hint = f"make it: vmkit matrix merge DIR --to {folder}"
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    return parse_merged(data, str(path))


def _find_results(folder: Path) -> Iterator[tuple[Path, PlanRecord]]:
    """Yields each folder of results at or below this one. Follows no links below it."""
    try:
        if not folder.is_dir():
            raise ConfigError(f"there is no directory {folder}")
        for name, inner, files in os.walk(folder, onerror=_raise):
            path = Path(name)
            if "plan.json" in files and (plan := read_plan(path)) is not None:
                yield path, plan
                inner.clear()
            if len(path.relative_to(folder).parts) >= MAX_DEPTH:
                inner.clear()
            inner.sort()
    except OSError as error:
        raise HostError(f"cannot read {error.filename or folder}: {error.strerror}") from error


def _raise(error: OSError) -> None:
    raise error


def _read_cells(folder: Path, troubles: dict[int, str]) -> Iterator[Found]:
    for name in sorted(os.listdir(folder)):
        if not _CELL.fullmatch(name):
            continue
        try:
            record = read_record(folder / name)
        except ConfigError as error:
            troubles[int(name)] = error.brief
        except OSError as error:
            troubles[int(name)] = f"cannot read {folder / name}: {error.strerror}"
        else:
            # A cell that began just before a kill has a lock alone.
            if record is not None:
                yield Found(strip_record(record), str(folder / name), count_cases(record), record)


def _measure(found: Found) -> int:
    """About how many bytes the texts of a record take."""
    assert found.whole is not None
    return sum(
        _PART_BYTES + len(command.text) + sum(_PART_BYTES + len(test.log) for test in command.tests)
        for command in found.whole.commands
    )


def write_merged(merged: Merged, to: Path, origin: str) -> None:
    """Writes all reports into a folder. Each appears whole. Raises HostError."""
    with explain_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        kcidb = KcidbReport(merged, origin)
        with _open_whole(to / "junit.xml") as junit, _open_whole(to / "kcidb.json") as report:
            junit.write(render_junit_head(SUITE, merged.cases))
            report.writelines(kcidb.render_head())
            comma = ""
            for cell, record in _read_whole(merged.cells):
                cases = make_missing_cases(cell) if record is None else make_record_cases(record)
                junit.writelines(render_junit_case(case) + "\n" for case in cases)
                for test in kcidb.render_tests(cell, record):
                    report.write(comma + test)
                    comma = ",\n"
            junit.write(render_junit_end())
            report.write(kcidb.render_end())
        texts: dict[str, Callable[[Merged], str]] = {
            "table.txt": render_table,
            "summary.md": render_markdown,
            "report.html": render_page,
        }
        for name, render in texts.items():
            write_whole(to / name, render(merged).encode(errors="replace"))
        # The last one: it is what --times and --before look for.
        write_whole(to / MERGED, render_merged(merged))


def _read_whole(cells: Iterable[MergedCell]) -> Iterator[tuple[MergedCell, CellRecord | None]]:
    for cell in cells:
        record = None if cell.found is None else cell.found.whole
        if cell.found is not None and record is None:
            record = read_record(Path(cell.found.place))
            if record is None or _identify(record) != _identify(cell.found.record):
                raise HostError(f"{cell.found.place} has changed while it was merged", hint="merge again")
        yield cell, record


def _identify(record: CellRecord) -> tuple[object, ...]:
    """What another writing of the record would change."""
    return record.matrix, record.number, record.attempt, record.state, record.started, len(record.commands)


@contextmanager
def _open_whole(path: Path) -> Iterator[TextIO]:
    """A text file that gets its name at the end of the block."""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}{NEW_SUFFIX}")
    try:
        with new.open("w", encoding="utf-8", errors="replace") as file:
            yield file
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
