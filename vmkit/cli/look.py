"""Verbs that look into a machine: logs and console."""

import contextlib
import os
import select
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkit.cli.machines import find_named, pick_machine
from vmkit.cli.show import CleanWriter, RawWriter, Writer
from vmkit.cli.values import complete_machines
from vmkit.errors import HostError, MachineError
from vmkit.machine.launch import Layout
from vmkit.machine.registry import find_state_directory
from vmkit.machine.spec import check_name
from vsh.registry import find_machine

if TYPE_CHECKING:
    from vsh.terminal import RawTerminal

READ_BYTES = 65536
FOLLOW_POLL_S = 0.2
CONNECT_DEADLINE_S = 5.0
# Ctrl-], as virsh and telnet have it: a byte that no guest needs from a console.
DETACH_BYTE = b"\x1d"
# What is typed into a guest that takes nothing: more is not read from a pipe, and dropped from a keyboard, so that
# Ctrl-] is always heard.
MAX_TYPED_BYTES = 64 * 1024

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
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--kind", type=click.Choice(sorted(KINDS)), default="console", show_default=True, help="Which log.")
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the machine ends.")
@click.option("--raw", is_flag=True, help="Print the bytes unchanged, control sequences included.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder of the logs instead.")
def logs(*, name: str | None, kind: str, follow: bool, raw: bool, only_path: bool) -> None:
    """Print a log of a machine.

    The machine is running, or it was the last one of that name that ended badly. Control sequences and bidi
    overrides, which could steer your terminal, are left out; --raw keeps them.
    """
    folder = _find_logs(name)
    if only_path:
        print(folder)
        return
    path = folder / KINDS[kind]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MachineError(f"there is no {kind} log in {folder}") from error
    writer = RawWriter() if raw else CleanWriter(sys.stdout)
    try:
        _copy(fd, writer)
        if follow:
            _follow(fd, path, writer)
        writer.finish()
    finally:
        os.close(fd)


@click.command("console")
@click.argument("name", required=False, shell_complete=complete_machines)
def console(*, name: str | None) -> None:
    """Attach to a machine's serial console; Ctrl-] leaves."""
    entry = pick_machine(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(CONNECT_DEADLINE_S)
        try:
            sock.connect(str(Path(entry.directory) / Layout.CONSOLE_SOCKET))
        except OSError as error:
            raise HostError(f"the console of '{entry.name}' does not answer: {error.strerror or error}") from error
        sock.setblocking(False)
        print(f"vmkit: the console of '{entry.name}'; Ctrl-] leaves", file=sys.stderr, flush=True)
        _attach(sock)


def _attach(sock: socket.socket) -> None:
    # Imported here: only an attached console needs a terminal.
    from vsh.terminal import RawTerminal  # noqa: PLC0415

    stdin = sys.stdin.fileno()
    terminal = RawTerminal(stdin)
    try:
        Attachment(sock, stdin, terminal if os.isatty(stdin) else None).run()
    finally:
        terminal.leave()


class Attachment:
    """A terminal at a console. Invariant: `_typed` is what the console has not taken yet."""

    def __init__(self, sock: socket.socket, stdin: int, terminal: "RawTerminal | None" = None) -> None:
        """terminal: of `stdin`; it is raw whenever this process is its foreground job."""
        self._sock = sock
        self._stdin: int | None = stdin
        self._terminal = terminal
        self._is_keyboard = os.isatty(stdin)
        self._typed = b""

    def run(self) -> None:
        """Until Ctrl-], or the console's end. The end of stdin ends typing only."""
        while True:
            console = self._sock.fileno()
            sources = [] if self._is_held() else self._list_sources()
            look_s = None if self._terminal is None else self._terminal.look_s
            readable, writable, _ = select.select([console, *sources], [console] if self._typed else [], [], look_s)
            try:
                if console in readable and not self._show():
                    return
                if writable:
                    self._typed = self._typed[self._sock.send(self._typed) :]
            except (BrokenPipeError, ConnectionResetError) as error:
                raise MachineError(
                    "the console was closed: it had not been read for too long, or typed into"
                ) from error
            if self._stdin in readable and not self._is_held() and not self._type():
                # What was typed before Ctrl-] still goes, if it can.
                with contextlib.suppress(OSError):
                    self._sock.send(self._typed)
                return

    def _is_held(self) -> bool:
        """The terminal belongs to another job; when it is ours again, it becomes raw here."""
        return self._terminal is not None and self._stdin is not None and not self._terminal.enter()

    def _list_sources(self) -> list[int]:
        is_full = len(self._typed) >= MAX_TYPED_BYTES and not self._is_keyboard
        return [] if self._stdin is None or is_full else [self._stdin]

    def _show(self) -> bool:
        data = self._sock.recv(READ_BYTES)
        RawWriter().write(data)
        return bool(data)

    def _type(self) -> bool:
        """False when the person wants to leave."""
        assert self._stdin is not None
        data = os.read(self._stdin, READ_BYTES)
        if not data:
            self._stdin = None
        before, leave, _ = data.partition(DETACH_BYTE) if self._is_keyboard else (data, b"", b"")
        room = MAX_TYPED_BYTES - len(self._typed) if self._is_keyboard else len(before)
        self._typed += before[:room]
        return not leave


def _find_logs(name: str | None) -> Path:
    """The folder of a running machine, else of the last one of that name that ended badly."""
    running = pick_machine(None) if name is None else find_named(check_name(name))
    if running is not None:
        return Path(running.directory)
    assert name is not None
    kept = find_state_directory() / name
    if not kept.is_dir():
        raise MachineError(
            f"there are no logs of '{name}': it is not running, and it did not end badly",
            hint="logs of machines that end as asked go with them",
        )
    return kept


def _follow(fd: int, path: Path, writer: Writer) -> None:
    """Copies what comes until the machine that writes there has ended; a log that rolls over is opened anew."""
    while _is_running(path.parent):
        time.sleep(FOLLOW_POLL_S)
        _copy(fd, writer)
        with contextlib.suppress(FileNotFoundError):
            _reopen(fd, path, writer)
        _copy(fd, writer)
    _copy(fd, writer)


def _is_running(folder: Path) -> bool:
    machine = find_machine(name=folder.name)
    return machine is not None and Path(machine.directory) == folder


def _reopen(fd: int, path: Path, writer: Writer) -> None:
    """Lets fd be the file that has the name now, when the old one has been read to its end."""
    new = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not os.path.sameopenfile(fd, new):
            _copy(fd, writer)
            os.dup2(new, fd, inheritable=False)
    finally:
        os.close(new)


def _copy(fd: int, writer: Writer) -> None:
    while data := os.read(fd, READ_BYTES):
        writer.write(data)
