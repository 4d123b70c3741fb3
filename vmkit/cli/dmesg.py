"""The verb `dmesg`."""

import sys
from dataclasses import asdict

import click

from vmkit.cli.show import CleanWriter, RawWriter, print_json
from vmkit.cli.values import complete_machines
from vmkit.machine.running import read_kernel_log
from vmkit.memory.lines import parse_lines, strip_levels


@click.command("dmesg")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--raw", is_flag=True, help="Print the bytes unchanged, with each line's level, as `dmesg --raw` does.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def dmesg(*, name: str | None, raw: bool, as_json: bool) -> None:
    """Print the kernel's log of a machine, read from the guest's memory.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    The guest need not be ready: it may boot, be paused, or hang, and its kernel may print nothing (`quiet`).
    For a name that no running machine has, vmkit prints the kept log of the last one that ended badly.
    vmkit removes control characters that could change your terminal; --raw keeps them.
    """
    log = read_kernel_log(name)
    if as_json:
        print_json([asdict(line) for line in parse_lines(log)])
        return
    writer = RawWriter() if raw else CleanWriter(sys.stdout)
    writer.write(log if raw else strip_levels(log))
    writer.finish()
