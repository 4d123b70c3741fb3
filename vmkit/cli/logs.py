"""The verb `logs`."""

import sys

import click

from vmkit.cli.show import CleanWriter, RawWriter
from vmkit.cli.values import complete_machines
from vmkit.machine.running import LOG_KINDS, find_logs, follow_log, read_log


@click.command("logs")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--kind", type=click.Choice(sorted(LOG_KINDS)), default="console", show_default=True, help="Which log.")
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the machine ends.")
@click.option("--raw", is_flag=True, help="Print the bytes unchanged, control sequences included.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder of the logs instead.")
def logs(*, name: str | None, kind: str, follow: bool, raw: bool, only_path: bool) -> None:
    """Print a log of a machine.

    The machine is running, or it was the last one of that name that ended badly. Control sequences and bidi
    overrides, which could steer your terminal, are left out; --raw keeps them.
    """
    folder = find_logs(name)
    if only_path:
        print(folder)
        return
    writer = RawWriter() if raw else CleanWriter(sys.stdout)
    for piece in follow_log(folder, kind) if follow else read_log(folder, kind):
        writer.write(piece)
    writer.finish()
