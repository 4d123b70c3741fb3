"""The verb `logs`."""

import sys
from collections.abc import Iterator

import click

from vmkit.cli.show import CleanWriter, RawWriter
from vmkit.cli.values import complete_machines
from vmkit.machine.parts.table import list_companion_logs
from vmkit.machine.running import (
    LOG_KINDS,
    SESSIONS,
    find_logs,
    follow_log,
    follow_sessions,
    read_kernel_log,
    read_log,
)
from vmkit.machine.sessions import find_beginning, render_sessions

KIND_HELP = (
    "Log to print: the guest's console, the machine's events, its sessions, QEMU's command (argv), or the output of "
    "QEMU (qemu, qmp), the monitor, or a process that serves a device of the machine "
    f"({', '.join(list_companion_logs())})."
)


@click.command("logs")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option(
    "--kind", type=click.Choice(sorted((*LOG_KINDS, SESSIONS))), default="console", show_default=True, help=KIND_HELP
)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the machine ends.")
@click.option("--raw", is_flag=True, help="Print the bytes unchanged, control sequences included.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder of the logs instead.")
def logs(*, name: str | None, kind: str, follow: bool, raw: bool, only_path: bool) -> None:
    """Print a log of a machine.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    For a name that no running machine has, vmkit prints the kept log of the last one that ended badly.
    vmkit removes control characters that could change your terminal; --raw keeps them.
    """
    if only_path:
        print(find_logs(name))
        return
    writer = RawWriter() if raw else CleanWriter(sys.stdout)
    for piece in _read(name, kind, follow=follow):
        writer.write(piece)
    writer.finish()


def _read(name: str | None, kind: str, *, follow: bool) -> Iterator[bytes]:
    """The log, in pieces. Raises MachineError, ConfigError."""
    if kind != SESSIONS:
        folder = find_logs(name)
        yield from follow_log(folder, kind) if follow else read_log(folder, kind)
    elif follow:
        yield from follow_sessions(name)
    else:
        log = read_kernel_log(name)
        begins_s = find_beginning(log)
        if begins_s:
            print(f"vmkit: the kernel's log begins at {begins_s:.0f} s: older sessions are lost", file=sys.stderr)
        yield render_sessions(log)
