"""The verb `logs`."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator

import click

from vmkit.cli.show import CleanWriter, RawWriter
from vmkit.cli.values import complete_machines
from vmkit.errors import ConfigError
from vmkit.machine.parts.table import list_companion_logs
from vmkit.machine.running import (
    LOG_KINDS,
    SESSIONS,
    SYSLOG,
    find_logs,
    follow_log,
    follow_sessions,
    read_kernel_log,
    read_log,
)
from vmkit.machine.sessions import find_beginning, render_sessions
from vmkit.memory.lines import LEVELS

KIND_HELP = (
    "Log to print: the guest's console, the machine's events, its sessions, QEMU's command (argv), or the output of "
    "QEMU (qemu, qmp), the monitor, or a process that serves a device of the machine "
    f"({', '.join(list_companion_logs())}). syslog is what the guest's programs and its kernel log."
)
# Those that choose among the records of the syslog.
_OF_SYSLOG = ("since", "priority", "grep", "as_json", "sink")


@click.command("logs")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option(
    "--kind", type=click.Choice(sorted((*LOG_KINDS, SESSIONS))), default="console", show_default=True, help=KIND_HELP
)
@click.option("-f", "--follow", is_flag=True, help="Print new lines until the machine ends.")
@click.option("--since", metavar="TIME", help="Of the syslog, print what came after TIME: 10m, 2h, or a date and time.")
@click.option(
    "--priority", metavar="LEVEL", help=f"Of the syslog, print this level and more severe ones: {', '.join(LEVELS)}."
)
@click.option("--grep", metavar="REGEX", help="Of the syslog, print records whose name and text REGEX is found in.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each record of the syslog.")
@click.option(
    "--to",
    "sink",
    type=click.Choice(["journal", "syslog"]),
    help="Send the records of the syslog to this host's journal or syslog, and print nothing.",
)
@click.option("--raw", is_flag=True, help="Print the bytes unchanged, control sequences included.")
@click.option("--path", "only_path", is_flag=True, help="Print the folder of the logs instead.")
@click.pass_context
def logs(
    context: click.Context,
    *,
    name: str | None,
    kind: str,
    follow: bool,
    since: str | None,
    priority: str | None,
    grep: str | None,
    as_json: bool,
    sink: str | None,
    raw: bool,
    only_path: bool,
) -> None:
    """Print a log of a machine.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    For a name that no running machine has, vmkit prints the kept log of the last one that ended badly.
    vmkit removes control characters that could change your terminal; --raw keeps them.
    The syslog has escapes in their place, also with --raw.
    """
    if only_path:
        print(find_logs(name))
        return
    if kind != SYSLOG:
        for option in context.command.params:
            if option.name in _OF_SYSLOG and context.params[option.name]:
                raise ConfigError(f"{option.opts[0]} needs --kind syslog")
    if sink is not None:
        _send(sink, _choose(name, follow=follow, since=since, priority=priority, grep=grep))
        return
    writer = RawWriter() if raw else CleanWriter(sys.stdout)
    if kind == SYSLOG:
        records = _choose(name, follow=follow, since=since, priority=priority, grep=grep)
        pieces = _render(records, as_json=as_json)
    else:
        pieces = _read(name, kind, follow=follow)
    for piece in pieces:
        writer.write(piece)
    writer.finish()


def _choose(
    name: str | None, *, follow: bool, since: str | None, priority: str | None, grep: str | None
) -> Iterator[dict[str, object]]:
    """The chosen records of the syslog. Raises MachineError, ConfigError."""
    from vmkit.machine import syslog  # noqa: PLC0415 - few look at it

    choice = syslog.Choice(
        since_s=0.0 if since is None else syslog.parse_since(since, time.time()),
        level=len(LEVELS) - 1 if priority is None else syslog.parse_level(priority),
        pattern=None if grep is None else syslog.parse_pattern(grep),
    )
    return filter(choice.is_wanted, syslog.read_records(name, is_following=follow, warn=_warn))


def _render(records: Iterator[dict[str, object]], *, as_json: bool) -> Iterator[bytes]:
    """The records, a line each."""
    from vmkit.machine.syslog import render_record  # noqa: PLC0415 - see _choose

    for record in records:
        yield (json.dumps(record) if as_json else render_record(record)).encode() + b"\n"


def _send(kind: str, records: Iterator[dict[str, object]]) -> None:
    """Sends records to this host's journal or syslog. Raises HostError, MachineError, ConfigError."""
    from vmkit.machine.sinks import open_sink  # noqa: PLC0415 - few send any

    with contextlib.closing(open_sink(kind)) as sink:
        for record in records:
            sink.send(record)


def _warn(text: str) -> None:
    print(f"vmkit: {text}", file=sys.stderr)


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
