"""The verb `vmkit matrix`."""

import sys
from pathlib import Path

import click

from vmkit.cli.show import open_progress, print_table
from vmkit.cli.values import COUNT
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
from vmkit.junit import CaseVerdict
from vmkit.matrix.execute import find_jobs, run_cells
from vmkit.matrix.plan import pick_cells, read_matrix
from vmkit.matrix.report import COLUMNS, render_github, render_report, render_rows


@click.command("matrix")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--only", multiple=True, metavar="CELL", help="Run only this cell, such as tiny/own/user (repeatable).")
@click.option("--jobs", type=COUNT, help="Machines at once [default: one per CPU, if memory allows].")
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write a JUnit report to this file.")
@click.option("--github", is_flag=True, help="Print the cells for a GitHub strategy.matrix and stop.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def matrix(
    *, file: Path, only: tuple[str, ...], jobs: int | None, junit: Path | None, github: bool, quiet: bool
) -> None:
    """Run commands in many machines: images x kernels x backends.

    FILE is a TOML file with the images, kernels, backends, architectures and commands; docs/howto/matrix.md shows
    one. A cell is one combination of these. Exits with 1 if a command failed or could not run.
    """
    planned = read_matrix(file)
    cells = pick_cells(planned, only)
    if github:
        print(render_github(cells))
        return
    with open_progress(quiet=quiet) as tell:
        # One after another, and before any machine starts: cells of one image would all wait for its build.
        for image, architecture in dict.fromkeys((cell.image, cell.architecture) for cell in cells):
            build_image(load_image(image, architecture), progress=tell)
        count = find_jobs(planned, jobs)
        tell(f"{len(cells)} machines, {count} at once", None)
        outcomes = run_cells(planned, cells, count, tell)
    if junit is not None:
        junit.parent.mkdir(parents=True, exist_ok=True)
        junit.write_bytes(render_report(outcomes))
    print_table(COLUMNS, render_rows(outcomes))
    if any(outcome.verdict in (CaseVerdict.FAILED, CaseVerdict.ERROR) for outcome in outcomes):
        sys.exit(1)
