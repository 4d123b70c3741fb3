"""The verb `guest-exec`."""

import os
import sys
from collections.abc import Iterable, Iterator

import click

from vmkit.cli.show import CleanWriter
from vmkit.cli.values import SECONDS, VSOCK_PORT, complete_machines
from vmkit.machine.running import pick_entry
from vsh.guest_exec import encode, find_address, send_commands
from vshd.wire.commands import COMMAND_BYTES_MAX, DEFAULT_PORT

CONNECT_S = 30.0
# Beyond the newline one byte more: a command that is too long must not look like a shorter one.
READ_BYTES = COMMAND_BYTES_MAX + 2


@click.command("guest-exec")
@click.argument("name", shell_complete=complete_machines)
@click.argument("commands", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
@click.option(
    "--port", type=VSOCK_PORT, default=DEFAULT_PORT, show_default=True, help="vsock port where the guest connects."
)
@click.option("--persistent", is_flag=True, help="Send any number of commands, each with its length in front.")
@click.option(
    "--timeout", type=SECONDS, default=CONNECT_S, show_default=True, help="Seconds that the guest may take to connect."
)
def guest_exec(*, name: str, commands: tuple[str, ...], port: int, persistent: bool, timeout: float) -> None:
    """Run commands in a guest that connects and asks for them.

    NAME is a machine's name or CID. In the guest runs `vshd --exec-from :PORT`, or vsock_guest_exec.
    It needs no server in the guest, so this works in an initramfs, before init.

    COMMAND is one line for the guest's shell, of at most 2,048 bytes. Without one, vmkit reads standard
    input: the command, or with --persistent a command on each line. vmkit waits until the guest has
    run all, and prints what the guest sends. Their output appears on the guest's console, and their
    status in the guest's log.
    """
    entry = pick_entry(name)
    if not persistent and len(commands) > 1:
        raise click.UsageError("several commands need --persistent")
    if commands:
        # All are looked at before the first is sent.
        messages: Iterable[bytes] = [encode(os.fsencode(command), is_persistent=persistent) for command in commands]
    elif persistent:
        messages = _read_lines()
    else:
        messages = [encode(sys.stdin.buffer.read(READ_BYTES).rstrip(b"\n"), is_persistent=False)]
    writer = CleanWriter(sys.stdout)
    send_commands(find_address(entry), port, messages, timeout_s=timeout, write=writer.write)
    writer.finish()


def _read_lines() -> Iterator[bytes]:
    while line := sys.stdin.buffer.readline(READ_BYTES):
        if command := line.rstrip(b"\n"):
            yield encode(command, is_persistent=True)
