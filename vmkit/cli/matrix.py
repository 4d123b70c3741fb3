"""The verbs `vmkit matrix ...`: run, lock, merge, emit."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkit.cli.emit import kubernetes, slurm
from vmkit.cli.show import Lines, open_lines, open_progress, print_table
from vmkit.cli.values import COUNT, SECONDS, Number
from vmkit.errors import ConfigError, HostError
from vmkit.matrix.execute import find_jobs
from vmkit.matrix.gather import merge_folders, read_merged, write_merged
from vmkit.matrix.images import prepare_images
from vmkit.matrix.job import CellEnd, JobEnd, JobPlan, run_job
from vmkit.matrix.kcidb import DEFAULT_ORIGIN, ORIGIN
from vmkit.matrix.lock import check_lock, describe_lock, find_matrix_lock, write_lock
from vmkit.matrix.merge import Merged
from vmkit.matrix.plan import Matrix, pick_cells, read_matrix
from vmkit.matrix.report import COLUMNS, render_github, render_report, render_rows
from vmkit.matrix.results import STATUSES, CellFault
from vmkit.matrix.schedule import Policy
from vmkit.matrix.shards import parse_shard, pick_number, plan_shards
from vmkit.matrix.summary import COLUMNS as MERGED_COLUMNS
from vmkit.matrix.summary import MAX_LISTED, list_notes, make_row, render_change, render_counts
from vsh.errors import VshError
from vsh.limits import find_remedy
from vsh.text import clean_line

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# Where a cell of an array writes, unless --to names another.
RESULTS = Path("matrix-results")
FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


class MatrixGroup(click.Group):
    """`vmkit matrix FILE` is short for `vmkit matrix run FILE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem  # noqa: PLC0415  (only a shell asks)

        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]


@click.group("matrix", cls=MatrixGroup)
def matrix() -> None:
    """Run commands in many machines: images x kernels x backends.

    `vmkit matrix FILE` is short for `vmkit matrix run FILE`; docs/howto/matrix.md shows a FILE.
    """


@matrix.command("run")
@FILE
@click.option("--only", multiple=True, metavar="CELL", help="Run only this cell, such as tiny/own/user (repeatable).")
@click.option("--cell", type=Number("number", 0), help="Run only the cell of this number; the first one is 0.")
@click.option("--shard", metavar="SHARD", help="Run one share of the cells, such as 2/8. auto: as an engine says.")
@click.option("--times", type=FOLDER, metavar="DIR", help="Share the cells out by the times in this merged result.")
@click.option("--to", type=FOLDER, metavar="DIR", help="Write each cell's results below here.")
@click.option("--jobs", type=COUNT, help="Machines at once [default: one per CPU, if memory allows].")
@click.option("--retry-machine-failures", type=Number("count", 0), default=0, help="Run a cell again so often (125).")
@click.option("--max-failures", type=COUNT, help="Start no other cell after so many that failed.")
@click.option("--deadline", type=SECONDS, help="End the whole run after so many seconds.")
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit report to this file.")
@click.option("--github", is_flag=True, help="Print the cells for a GitHub strategy.matrix, as emit github does.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each cell that ends.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def run(  # noqa: PLR0913  (an option each)
    *,
    file: Path,
    only: tuple[str, ...],
    cell: int | None,
    shard: str | None,
    times: Path | None,
    to: Path | None,
    jobs: int | None,
    retry_machine_failures: int,
    max_failures: int | None,
    deadline: float | None,
    junit: Path | None,
    github: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the cells of a matrix, or some of them.

    FILE is a TOML file with the images or roots, kernels, backends, architectures and commands. A cell is one of
    their combinations.
    Exits with 0 if all commands passed, with 1 if one failed or the guest's kernel panicked, with 124 if time was
    over, with 125 if a machine or this host failed.
    """
    planned = read_matrix(file)
    numbers = _pick_numbers(planned, only, cell, shard, times)
    if github:
        print(render_github([planned.cells[number] for number in numbers]))
        return
    if to is None and (cell is not None or shard is not None):
        to = RESULTS
    policy = Policy(retry_machine_failures, max_failures)
    with _blame_host():
        with open_lines(quiet=quiet) as lines:
            images = prepare_images((planned.cells[number] for number in numbers), lines.tell)
            found = describe_lock(planned, numbers, images)
            check_lock(file, found)
            count = find_jobs(planned, jobs)
            lines.tell(f"{_count(len(numbers), 'cell')}, {_count(count, 'machine')} at once", None)
            if as_json:
                print_event({"event": "begin", "matrix": planned.digest, "cells": len(numbers), "jobs": count})
            watcher = _Watcher(len(numbers), lines, as_json=as_json)
            end = run_job(JobPlan(planned, numbers, count, to, policy, deadline, found), watcher.watch)
        if junit is not None:
            _write_report(junit, render_report(end.results))
        with _explain_output():
            if as_json:
                print_event(end.render_event())
            else:
                _print_end(end)
    if end.fault is not CellFault.NONE:
        sys.exit(STATUSES[end.fault])


@contextlib.contextmanager
def _blame_host() -> Iterator[None]:
    """Gives an error of the block the status of a failed machine: no test has failed, and there is no result."""
    try:
        yield
    except VshError as error:
        if error.status == VshError.status:
            error.status = STATUSES[CellFault.MACHINE]
        raise
    except BrokenPipeError:
        # The reader of the output has gone, which has a status of its own.
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise HostError(f"{where}{error.strerror or error}", status=STATUSES[CellFault.MACHINE]) from error
    except Exception as error:
        hint = "this is a fault of vmkit; `vmkit --debug ...` shows where"
        raise HostError(f"internal error: {error!r}", hint=hint, status=STATUSES[CellFault.MACHINE]) from error


@contextlib.contextmanager
def _explain_output() -> Iterator[None]:
    """Names what could not be written, and writes all of it: the flush at the end of the program has another status."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError(f"cannot write the answer: {error.strerror}", hint=find_remedy(error)) from error


def _pick_numbers(
    planned: Matrix, only: tuple[str, ...], cell: int | None, shard: str | None, times: Path | None
) -> list[int]:
    if times is not None and shard is None:
        raise ConfigError("--times shares the cells out, and needs --shard")
    if sum((bool(only), cell is not None, shard is not None)) > 1:
        raise ConfigError("give one of --only, --cell and --shard")
    names = [one.name for one in planned.cells]
    if cell is not None:
        return pick_number(cell, len(names))
    if shard is not None:
        share = parse_shard(shard, os.environ, len(names))
        seconds = {} if times is None else read_merged(times)[1]
        return plan_shards(names, share.count, seconds)[share.index - 1]
    if only:
        pick_cells(planned, only)
        return [number for number, name in enumerate(names) if name in set(only)]
    return list(range(len(names)))


class _Watcher:
    """Prints a line for each cell that has ended, and counts them; for programs, an event."""

    def __init__(self, total: int, lines: Lines, *, as_json: bool) -> None:
        self._total = total
        self._lines = lines
        self._as_json = as_json
        self._done = 0
        self._bad = 0

    def watch(self, end: CellEnd) -> None:
        self._done += not end.is_repeated
        self._bad += not end.is_repeated and end.fault is not CellFault.NONE
        verdicts = ", ".join(f"{one.command.name} {one.verdict}" for one in end.results)
        again = ", and runs again" if end.is_repeated else ", from an earlier run" if end.is_kept else ""
        self._lines.add(f"{end.cell.name}: {verdicts}{again} ({self._done} of {self._total})")
        self._lines.tell(f"{self._done} of {self._total} cells, {self._bad} failed", self._done / self._total)
        if self._as_json:
            print_event(end.render_event())


def print_event(event: Mapping[str, object]) -> None:
    """Prints a line of JSON at once: the reader may wait for it."""
    print(json.dumps({"t": round(time.time(), 3), **event}), flush=True)


def _write_report(path: Path, report: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(report)


def _print_end(end: JobEnd) -> None:
    print_table(COLUMNS, render_rows(end.results))
    if end.dropped:
        print(f"vmkit: {_count(len(end.dropped), 'cell')} did not run: {end.stopped}", file=sys.stderr)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@matrix.command("lock")
@FILE
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def lock(*, file: Path, quiet: bool) -> None:
    """Write the digest of each image and kernel into a lock file.

    FILE is the matrix; the lock of lab.toml is lab.lock beside it. A run refuses another image or kernel then.
    """
    planned = read_matrix(file)
    numbers = range(len(planned.cells))
    with open_progress(quiet=quiet) as tell:
        found = describe_lock(planned, numbers, prepare_images(planned.cells, tell))
    path = find_matrix_lock(file)
    write_lock(path, found)
    print(f"{path} has {_count(len(found.images), 'image')} and {_count(len(found.kernels), 'kernel')}")


@matrix.command("merge")
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=FOLDER)
@click.option("--to", type=FOLDER, metavar="DIR", required=True, help="Write the reports into this directory.")
@click.option("--before", type=FOLDER, metavar="DIR", help="List what changed since this earlier merged result.")
@click.option("--origin", metavar="NAME", default=DEFAULT_ORIGIN, show_default=True, help="Your name in KCIDB.")
@click.option("-q", "--quiet", is_flag=True, help="Print the counts alone.")
def merge(*, folders: tuple[Path, ...], to: Path, before: Path | None, origin: str, quiet: bool) -> None:
    """Make one report of the results of all cells.

    DIR is what --to of the runs named, or a directory above several of these. The reports are results.json,
    junit.xml, table.txt, summary.md, report.html and kcidb.json. A cell without results is reported as missing.
    Exits as `vmkit matrix run` would for all cells; a missing cell counts as a machine that failed.
    """
    if not ORIGIN.fullmatch(origin):
        raise ConfigError(f"--origin must have lower-case letters, digits and '_' alone, not '{origin}'")
    with _blame_host():
        merged = merge_folders(folders, before)
        write_merged(merged, to, origin)
        with _explain_output():
            _print_merged(merged, to, quiet=quiet)
    if merged.fault is not CellFault.NONE:
        sys.exit(STATUSES[merged.fault])


def _print_merged(merged: Merged, to: Path, *, quiet: bool) -> None:
    if not quiet:
        for note in list_notes(merged):
            print(f"vmkit: {clean_line(note)}", file=sys.stderr)
        if merged.bad:
            print_table(MERGED_COLUMNS, [tuple(map(clean_line, make_row(one))) for one in merged.bad[:MAX_LISTED]])
        if len(merged.bad) > MAX_LISTED:
            print(f"and {len(merged.bad) - MAX_LISTED} more, see {to / 'table.txt'}")
        for change in (merged.changes or ())[:MAX_LISTED]:
            print(clean_line(render_change(change)))
    print(render_counts(merged.counts))


@matrix.group("emit")
def emit() -> None:
    """Print a matrix in the form of an engine that runs jobs."""


@emit.command("github")
@FILE
def github(*, file: Path) -> None:
    """Print the cells for the strategy.matrix of a GitHub job.

    FILE is the matrix. The line is for $GITHUB_OUTPUT.
    """
    print(render_github(read_matrix(file).cells))


emit.add_command(slurm)
emit.add_command(kubernetes)
