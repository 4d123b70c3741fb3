"""Verbs about machines that stay: create, rm. `up`, `down` and `list --all` know them, too."""

from typing import Any

import click
from click.core import ParameterSource

from vmkit.cli.show import open_progress, print_json
from vmkit.cli.storedrows import render_size, render_stored
from vmkit.cli.up import add_options
from vmkit.cli.values import complete_sources, complete_stored
from vmkit.errors import MachineError
from vmkit.machine.stored import NOT_KEPT, create_stored, parse_disk_size
from vmkit.stored.store import remove_stored
from vsh.errors import VshError

# `--partition` says which part of the SOURCE is meant.
LEFT_OUT = tuple(name for name in NOT_KEPT if name != "partition")


@click.command("create")
@click.argument("name")
@click.argument("source", shell_complete=complete_sources)
@click.option(
    "--disk-size",
    metavar="SIZE",
    help="Size of its disk, such as 20G [default: 10G, or that of the disk that SOURCE names].",
)
@add_options(leave_out=LEFT_OUT)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.pass_context
def create(
    context: click.Context,
    /,
    *,
    name: str,
    source: str,
    disk_size: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Create a machine that keeps what its guest writes.

    `vmkit up NAME` starts it with the options that you give here. SOURCE is a root of yours: the path of a folder, a
    tar or an ext4 disk, oci:PATH, docker-archive:PATH, docker://NAME, or - for an archive on standard input.
    """
    given = take_given(context, options)
    partition = given.pop("partition", None)
    with open_progress(quiet=quiet) as tell:
        size = None if disk_size is None else parse_disk_size(disk_size)
        stored = create_stored(name, source, given, partition=partition, disk_bytes=size, tell=tell)
    if as_json:
        print_json(render_stored(stored))
        return
    print(f"{name} is created: a disk of {render_size(stored.require_record().disk_bytes)}")
    if not quiet:
        print(f"start it:  vmkit up {name}")


@click.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_stored)
def rm(*, names: tuple[str, ...]) -> None:
    """Remove stored machines with their disks.

    NAMES are the names that you gave to `vmkit create`. vmkit refuses to remove a machine that runs.
    """
    failures: list[VshError] = []
    for name in dict.fromkeys(names):
        try:
            remove_stored(name)
        except VshError as error:
            failures.append(error)
        else:
            print(f"{name} is removed", flush=True)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        details = "\n".join(f"{error.brief}; {error.hint}" for error in failures)
        raise MachineError(f"{len(failures)} machines were not removed", details=details)


def take_given(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the command line has, without their defaults."""
    return {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) not in (ParameterSource.DEFAULT, None)
    }
