"""Verbs about running machines: list, status, down, kill, wait."""

import sys
import time
from collections.abc import Callable

import click

from vmkit.cli.show import print_json, print_table, read_wall
from vmkit.cli.values import SECONDS, complete_machines
from vmkit.errors import ConfigError, MachineError
from vmkit.machine import stop
from vmkit.machine.registry import sweep
from vmkit.machine.running import pick_entry
from vsh.errors import VshError
from vsh.registry import Entry, read_machines


def render_entry(entry: Entry) -> dict[str, object]:
    """A machine as JSON shows it."""
    return {**entry.record, "directory": entry.directory}


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(*, as_json: bool) -> None:
    """List the running machines."""
    sweep()
    machines = read_machines()
    if as_json:
        print_json([render_entry(machine) for machine in machines])
        return
    if not machines:
        print("no machine is running; start one: vmkit up", file=sys.stderr)
        return
    rows = [
        (
            machine.name,
            str(machine.cid),
            machine.state,
            str(machine.record.get("image", "")),
            str(machine.record.get("accelerator", "")),
            machine.backend,
            f"{machine.record.get('memory_mib', '?')} MiB",
            _render_age(machine),
        )
        for machine in machines
    ]
    print_table(("NAME", "CID", "STATE", "IMAGE", "ACCEL", "BACKEND", "MEMORY", "UP"), rows)


@click.command("status")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(*, name: str | None, as_json: bool) -> None:
    """Show what vmkit knows about a machine.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    """
    entry = pick_entry(name)
    if as_json:
        print_json(render_entry(entry))
        return
    shown = {"name": entry.name, "state": entry.state, "cid": entry.cid, **entry.record, "directory": entry.directory}
    shown.pop("schema", None)
    shown["up"] = _render_age(entry)
    shown.pop("started", None)
    # One line per layer: a reason may be a sentence.
    shown |= {f"wall {layer}": state for layer, state in read_wall(entry.record).items()}
    shown.pop("wall", None)
    width = max(len(key) for key in shown)
    for key, value in shown.items():
        if value is not None:
            print(f"{key:<{width}}  {value}")


@click.command("down")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Shut all running machines down.")
@click.option(
    "--timeout",
    type=SECONDS,
    default=stop.POWER_OFF_DEADLINE_S,
    show_default=True,
    help="Seconds that the guest gets to shut down, before vmkit ends QEMU.",
)
def down(*, names: tuple[str, ...], everything: bool, timeout: float) -> None:
    """Shut machines down: ask the guest, then QEMU, then kill the process.

    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    """
    _end_several(
        _pick_several(names, everything), lambda entry: stop.power_off(entry, timeout_s=timeout, tell=_tell), "is down"
    )


@click.command("kill")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Kill all running machines.")
def kill(*, names: tuple[str, ...], everything: bool) -> None:
    """Kill machines at once, without asking the guest.

    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    """
    _end_several(_pick_several(names, everything), stop.kill, "is gone")


@click.command("wait")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--timeout", type=SECONDS, help="Seconds to wait [default: for ever].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def wait(*, name: str | None, timeout: float | None, as_json: bool) -> None:
    """Wait until a machine ends, and print why.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    Exits with 0 after an end on request, and with 1 after an unexpected end.
    """
    entry = pick_entry(name)
    ended = stop.wait_for_end(entry, timeout)
    if ended is None:
        raise MachineError(f"'{entry.name}' still runs after {timeout:g} s")
    if as_json:
        print_json({"name": entry.name, "reason": ended.reason, "brief": ended.brief, "expected": ended.expected})
    else:
        print(f"{entry.name}: {ended.brief}")
    if not ended.expected:
        sys.exit(1)


def _end_several(entries: list[Entry], end: Callable[[Entry], None], words: str) -> None:
    """Ends one after another; one that does not end keeps no other from it. Raises MachineError about all such."""
    failures: list[VshError] = []
    for entry in entries:
        try:
            end(entry)
        except VshError as error:
            failures.append(error)
        else:
            print(f"{entry.name} {words}", flush=True)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise MachineError(
            f"{len(failures)} machines did not end", details="\n".join(f"{e.brief}; {e.hint}" for e in failures)
        )


def _tell(text: str) -> None:
    print(f"vmkit: {text}", file=sys.stderr, flush=True)


def _pick_several(names: tuple[str, ...], everything: bool) -> list[Entry]:
    if everything:
        if names:
            raise ConfigError("give --all or names, not both")
        return read_machines()
    picked = [pick_entry(name) for name in names] or [pick_entry(None)]
    # Named twice, by its name and its CID perhaps, a machine ends once.
    return list({entry.name: entry for entry in picked}.values())


def _render_age(entry: Entry) -> str:
    started = entry.record.get("started")
    if not isinstance(started, int | float):
        return "?"
    minutes, seconds = divmod(max(0, int(time.time() - started)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
