"""The verb bench: the race of vsh against ssh, its report, and what changed between two runs."""

import sys
import time
from pathlib import Path

import click

from vmkit.bench.series import Outcome, compare, find_other_sizes, read_outcome, render_outcome

RESULTS = "vmkit-bench"


@click.group("bench", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="Measure less: some minutes under TCG instead of 20.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="JSON file to write [default: vmkit-bench/DATE.json].",
)
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", help="As for `vmkit up`.")
@click.pass_context
def bench(context: click.Context, *, quick: bool, out: Path | None, accel: str) -> None:
    """Measure vsh against ssh over the same vsock.

    Starts a machine of the image `bench`, prints a table and writes the figures to a JSON file.
    """
    if context.invoked_subcommand is not None:
        return
    # Imported here: the other verbs read files.
    from vmkit.bench.facts import gather_facts  # noqa: PLC0415
    from vmkit.bench.measurements import FULL, QUICK, run_heats  # noqa: PLC0415
    from vmkit.bench.report import render_facts, render_table  # noqa: PLC0415
    from vmkit.bench.testbed import open_track  # noqa: PLC0415

    target = out or Path(RESULTS) / time.strftime("%Y%m%d-%H%M%S.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    _tell("starting a machine of the image bench")
    with open_track(accelerator=None if accel == "auto" else accel) as track:
        facts = gather_facts(track)
        series, failures = run_heats(track, QUICK if quick else FULL, _tell)
    outcome = Outcome(facts, tuple(series), tuple(failures))
    target.write_text(render_outcome(outcome))
    print(f"{render_facts(outcome)}\n{render_table(outcome)}")
    _tell(f"the figures are in {target}; plots and a page: vmkit bench report {target}")


@bench.command("report")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--to",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder to write to [default: beside FILE].",
)
@click.option(
    "--format",
    "plots_as",
    type=click.Choice(["svg", "png"]),
    default="svg",
    show_default=True,
    help="Format of the plots.",
)
def report(*, file: Path, folder: Path | None, plots_as: str) -> None:
    """Make a table, plots and an HTML page from a run's figures."""
    from vmkit.bench.report import render_table, write_report  # noqa: PLC0415

    outcome = read_outcome(file)
    print(render_table(outcome))
    paths = write_report(outcome, folder or file.with_suffix(""), plots_as=plots_as)
    _tell(f"open {paths[0]}")


@bench.command("compare")
@click.argument("old", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("new", type=click.Path(path_type=Path, dir_okay=False))
def compare_(*, old: Path, new: Path) -> None:
    """Print what changed between two runs beyond their noise.

    The changes are ratios of medians, with intervals of 95 %.
    """
    from vmkit.bench.report import render_changes  # noqa: PLC0415

    before, after = read_outcome(old), read_outcome(new)
    for name in ("processor", "accelerator", "backend", "guest kernel", "QEMU"):
        if before.facts.get(name) != after.facts.get(name):
            _tell(f"not alike: {name}: {before.facts.get(name)} and {after.facts.get(name)}")
    for heat in find_other_sizes(before, after):
        _tell(f"not alike: {heat}: transfers are of other sizes, and so is what of them is the start of a session")
    print(render_changes(compare(before, after)), end="")


def _tell(text: str) -> None:
    print(f"vmkit: {text}", file=sys.stderr, flush=True)
