"""Forwards every port that a guest listens on, in the foreground, until a signal: `vmkit forward NAME --auto`."""

import json
from collections.abc import Callable, Sequence

from vsh.address import Address, find_by_name
from vsh.forward.choice import EVERY_PORT, AutomaticSpec, PortChange, parse_ports
from vsh.forward.forwarder import Forwarder
from vsh.signals import SIGHUP, SIGINT, SIGTERM, Wakeup

SIGNALLED = 128
NOTICE = "notice"


def follow_ports(
    machine: str,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    user: str,
    tell_change: Callable[[PortChange], None],
    tell_notice: Callable[[str], None],
    tell_line: Callable[[str], None],
) -> int:
    """Forwards until a signal; returns the exit status. Raises VshError where it cannot begin.

    include, exclude: texts such as `80,8000-8099`; without `include` every port counts. tell_line: gets a line at the
    beginning, and one for each connection that could not be opened.
    """
    wanted = parse_ports(include) if include else EVERY_PORT
    unwanted = parse_ports(exclude) if exclude else ()

    def find() -> Address:
        return find_by_name(machine)

    wakeup = Wakeup((SIGHUP, SIGINT, SIGTERM))
    spec = AutomaticSpec(tell_change, tell_notice, wanted, unwanted)
    with Forwarder(find, [spec], user=user, tell=tell_line, is_lasting=True) as forwarder:
        tell_line(f"forwarding the ports of {machine} until Ctrl-C")
        forwarder.run(wakeup.fd)
    return SIGNALLED + next(iter(wakeup.take()), SIGTERM)


def render_change(change: PortChange) -> str:
    """Returns the line for a person."""
    if change.kind == PortChange.CLOSED:
        return f"port {change.port} is closed"
    if change.kind == PortChange.REFUSED:
        return f"port {change.port} is not forwarded: {change.reason}"
    line = f"port {change.port} is at {' and '.join(change.listening)}"
    return f"{line}; {change.reason}" if change.reason else line


def render_event(change: PortChange) -> str:
    """Returns the line of --json."""
    event = {
        "event": change.kind,
        "port": change.port,
        "listening": list(change.listening),
        "reason": change.reason,
    }
    return json.dumps(event)


def render_notice(text: str) -> str:
    """Returns a notice as a line of --json."""
    return json.dumps({"event": NOTICE, "reason": text})
