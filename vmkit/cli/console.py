"""The verb `console`."""

import os
import sys

import click

from vmkit.cli.show import RawWriter
from vmkit.cli.values import complete_machines
from vmkit.machine.attach import Attachment
from vmkit.machine.running import RunningMachine, pick_entry


@click.command("console")
@click.argument("name", required=False, shell_complete=complete_machines)
def console(*, name: str | None) -> None:
    """Attach to a machine's serial console; Ctrl-] leaves.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    """
    # Imported here: only an attached console needs a terminal.
    from vsh.terminal import RawTerminal  # noqa: PLC0415

    machine = RunningMachine(pick_entry(name))
    with machine.open_console() as sock:
        sock.setblocking(False)
        print(f"vmkit: the console of '{machine.name}'; Ctrl-] leaves", file=sys.stderr, flush=True)
        stdin = sys.stdin.fileno()
        terminal = RawTerminal(stdin)
        try:
            Attachment(sock, stdin, RawWriter().write, terminal if os.isatty(stdin) else None).run()
        finally:
            terminal.leave()
