"""Verbs that look into a machine: logs and console."""

import os
import select
import socket
import sys
import time
from pathlib import Path

import click

from vmkit.cli.machines import pick_machine
from vmkit.errors import HostError, MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.registry import find_state_directory
from vmkit.machine.spec import check_name
from vsh.registry import find_machine

READ_BYTES = 65536
FOLLOW_POLL_S = 0.2
CONNECT_DEADLINE_S = 5.0
# Ctrl-], as virsh and telnet have it: a byte that no guest needs from a console.
DETACH_BYTE = b"\x1d"

KINDS = {
    "console": Layout.CONSOLE_LOG,
    "events": Layout.EVENTS,
    "qmp": Layout.QMP_LOG,
    "qemu": Layout.QEMU_LOG,
    "vsock": Layout.DEVICE_LOG,
    "monitor": Layout.MONITOR_LOG,
    "argv": Layout.ARGV,
}


@click.command("logs")
@click.argument("name", required=False)
@click.option("--kind", type=click.Choice(sorted(KINDS)), default="console", show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine ends.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder of the logs instead.")
def logs(*, name: str | None, kind: str, follow: bool, only_path: bool) -> None:
    """Print a log of a running machine, or of the last one of that name that ended badly."""
    folder = _find_logs(name)
    if only_path:
        print(folder)
        return
    path = folder / KINDS[kind]
    try:
        with path.open("rb") as file:
            _copy(file.fileno())
            while follow and folder.exists():
                time.sleep(FOLLOW_POLL_S)
                _copy(file.fileno())
    except FileNotFoundError as error:
        raise MachineError(f"there is no {kind} log in {folder}") from error


@click.command("console")
@click.argument("name", required=False)
def console(*, name: str | None) -> None:
    """Attach to a machine's serial console; Ctrl-] leaves."""
    entry = pick_machine(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONNECT_DEADLINE_S)
        try:
            sock.connect(str(Path(entry.directory) / Layout.CONSOLE_SOCKET))
        except OSError as error:
            raise HostError(f"the console of '{entry.name}' does not answer: {error.strerror}") from error
        sock.settimeout(None)
        print(f"vmkit: the console of '{entry.name}'; Ctrl-] leaves", file=sys.stderr)
        _attach(sock)


def _attach(sock: socket.socket) -> None:
    # Imported here: only an attached console needs a terminal.
    from vsh.terminal import RawTerminal  # noqa: PLC0415

    stdin = sys.stdin.fileno()
    terminal = RawTerminal(stdin)
    terminal.enter()
    try:
        _pump(sock, stdin)
    finally:
        terminal.leave()


def _pump(sock: socket.socket, stdin: int) -> None:
    inputs: list[int] = [stdin, sock.fileno()]
    while True:
        readable, _, _ = select.select(inputs, [], [])
        if sock.fileno() in readable:
            data = sock.recv(READ_BYTES)
            if not data:
                return
            _write(data)
        if stdin in readable:
            data = os.read(stdin, READ_BYTES)
            if not data:
                inputs.remove(stdin)
                continue
            before, leave, _ = data.partition(DETACH_BYTE)
            sock.sendall(before)
            if leave:
                return


def _find_logs(name: str | None) -> Path:
    """The folder of a running machine, else of the last one of that name that ended badly."""
    if name is None:
        return Path(pick_machine(None).directory)
    running = find_machine(name=check_name(name)) or (find_machine(cid=int(name)) if name.isdecimal() else None)
    if running is not None:
        return Path(running.directory)
    kept = find_state_directory() / name
    if not kept.is_dir():
        raise MachineError(
            f"there are no logs of '{name}': it is not running, and it did not end badly",
            hint="logs of machines that end as asked go with them",
        )
    return kept


def _copy(fd: int) -> None:
    while data := os.read(fd, READ_BYTES):
        _write(data)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
