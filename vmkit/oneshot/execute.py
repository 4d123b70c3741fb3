"""Runs one command in a machine of its own: the machine begins before it, ends with it, and leaves nothing.

The machine is owned: it ends with this process, however that ends.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from vmkit.machine import stop
from vmkit.machine.choose import Tell
from vmkit.machine.files import make_folders
from vmkit.machine.handover import MonitorHandle
from vmkit.machine.machine import end_started, find_started
from vmkit.machine.running import explain_ending
from vmkit.machine.source import ANY, check_settings, take_source
from vmkit.machine.spec import DiskMode, MachineSpec
from vmkit.machine.start import Started, start_machine
from vmkit.oneshot.plan import Command, Wishes, plan_command
from vsh.address import address_of
from vsh.ending import read_ending
from vsh.errors import ConnectionLost, ExecError, VshError
from vsh.interactive import InteractiveShell, TerminalGone
from vsh.pump import SinkGone
from vsh.registry import Entry
from vsh.session import Session, make_limits, open_session
from vsh.shell import Interrupted, Shell
from vsh.stdio import replace_with_null
from vsh.terminal import find_window
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

# docker's: the machine, or the way to the command, failed.
MACHINE_FAILED = 125
# Long enough for a guest under emulation on a busy host.
CONNECT_TIMEOUT_S = 30.0
# For what is in a guest's memory and not on a disk yet, when a signal or an error ends the run.
BROKEN_OFF_POWER_OFF_S = 5.0
# Of a terminal that has none of its own.
FALLBACK_SIZE = (24, 80, 0, 0)
# docker's, where this host's terminal has no name.
TERMINAL_NAME = "xterm"
# docker's: the third SIGINT or SIGTERM ends the run, whatever the command does.
PATIENCE = 3
_COMMANDS_OWN = (messages.NOT_FOUND, messages.NOT_EXECUTABLE, messages.TOO_LONG)


@dataclass(frozen=True, slots=True)
class OpenMachine:
    """A machine that is ready, and what it is there for."""

    started: Started
    command: Command


@contextlib.contextmanager
def open_machine(
    spec: MachineSpec, wishes: Wishes, source: str, tell: Tell, monitor: MonitorHandle
) -> Iterator[OpenMachine]:
    """A machine for the command, which ends with the block. Without a command nothing starts. Raises VshError kinds.

    source: what the user gave as SOURCE. monitor: one that was started already.
    """
    prepared = take_source(spec, tell)
    command = plan_command(prepared.container, wishes, source, has_shell=spec.image != ANY)
    if prepared.container is not None or command.env or command.working_dir or command.user:
        prepared = replace(prepared, container=check_settings(command.make_settings(), source))
    started = start_machine(prepared, tell=tell, monitor=monitor, is_owned=True)
    writes = any(disk.mode is DiskMode.READ_WRITE for disk in spec.disks)
    with end_with_block(partial(end_started, started), writes=writes):
        yield OpenMachine(started, command)


@contextlib.contextmanager
def end_with_block(end: Callable[[Callable[[Entry], None]], None], *, writes: bool) -> Iterator[None]:
    """Ends a machine with the block, however that is left. end: ends it in the way that it is given, if it runs.

    writes: whether the command can write to a disk. What it wrote is in the guest's memory until the guest ends.
    """
    try:
        try:
            yield
        except BaseException:
            if writes:
                # The user is told why the block was left.
                with contextlib.suppress(VshError):
                    end(partial(stop.power_off, timeout_s=BROKEN_OFF_POWER_OFF_S))
            raise
        if writes:
            end(stop.power_off)
    finally:
        end(stop.kill)


def run_command(machine: OpenMachine, wishes: Wishes) -> int:
    """Runs the command with this program's streams, signals and terminal; its status. Raises VshError kinds."""
    entry = find_started(machine.started)
    if entry is None:
        name = machine.started.name
        raise explain_ending(name, read_ending(name, machine.started.monitor.pid))
    if not wishes.has_stdin:
        replace_with_null(0, os.O_RDONLY)
    with _open_session(entry, machine.command, has_terminal=wishes.has_terminal) as session:
        shell = InteractiveShell(session) if wishes.has_terminal else Shell(session)
        shell.patience = PATIENCE
        try:
            return shell.run(None)
        except ConnectionLost as error:
            session.explain(error)
            raise


def find_status(error: VshError) -> int:
    """The status for an error, as docker has it."""
    if isinstance(error, Interrupted | TerminalGone | SinkGone):
        return error.status
    if isinstance(error, ExecError) and error.kind in _COMMANDS_OWN:
        return error.status
    return MACHINE_FAILED


def _open_session(entry: Entry, command: Command, *, has_terminal: bool) -> Session:
    request = make_request(command, os.environ, has_terminal=has_terminal)
    try:
        return _open(entry, request)
    except ExecError as error:
        if error.kind != messages.BAD_DIRECTORY or not command.working_dir:
            raise
    # As docker does. Most images have theirs.
    make_folders(entry, command.working_dir)
    return _open(entry, request)


def _open(entry: Entry, request: SetupConnectionRequest) -> Session:
    return open_session(address_of(entry), request, limits=make_limits(), timeout_s=CONNECT_TIMEOUT_S)


def make_request(command: Command, environ: Mapping[str, str], *, has_terminal: bool) -> SetupConnectionRequest:
    """The request for a command."""
    env = dict(command.env)
    size = FALLBACK_SIZE
    if has_terminal:
        env.setdefault("TERM", environ.get("TERM") or TERMINAL_NAME)
        found = find_window()
        size = found if found[0] else FALLBACK_SIZE
    request = SetupConnectionRequest(
        target=messages.VM_SHELL,
        user=os.fsencode(command.user),
        env={os.fsencode(name): os.fsencode(value) for name, value in env.items()},
        argv=[os.fsencode(word) for word in command.argv],
        window_rows=size[0] if has_terminal else 0,
        window_cols=size[1] if has_terminal else 0,
        nopty=not has_terminal,
        cwd=os.fsencode(command.working_dir),
    )
    if has_terminal:
        request.window_xpixels, request.window_ypixels = size[2:]
    request.keeps_env = True
    return request
