"""Verbs about running machines: list, status, down, kill, wait."""

import sys
import time

import click

from vmkit.cli.show import print_json, print_table
from vmkit.errors import ConfigError, MachineError
from vmkit.machine import stop
from vmkit.machine.registry import sweep
from vsh.registry import Machine as Entry
from vsh.registry import find_machine, read_machines


def pick_machine(name: str | None) -> Entry:
    """The machine of that name or CID, or the only one there is. Raises MachineError that names those there are."""
    machines = read_machines()
    if name is None:
        if len(machines) == 1:
            return machines[0]
        if not machines:
            raise MachineError("no machine is running", hint="start one: vmkit up")
        raise ConfigError("several machines are running: say which", hint=", ".join(m.name for m in machines))
    found = find_machine(name=name)
    if found is None and name.isdecimal():
        found = find_machine(cid=int(name))
    if found is None:
        known = ", ".join(machine.name for machine in machines)
        raise MachineError(
            f"no machine named '{name}' is running",
            hint=f"running: {known}" if known else "start one: vmkit up",
        )
    return found


def render_entry(entry: Entry) -> dict[str, object]:
    """A machine as JSON shows it."""
    return {**entry.record, "directory": entry.directory}


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
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
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def status(*, name: str | None, as_json: bool) -> None:
    """Show all that is known of a machine."""
    entry = pick_machine(name)
    if as_json:
        print_json(render_entry(entry))
        return
    shown = {"name": entry.name, "state": entry.state, "cid": entry.cid, **entry.record, "directory": entry.directory}
    shown.pop("schema", None)
    shown["up"] = _render_age(entry)
    shown.pop("started", None)
    width = max(len(key) for key in shown)
    for key, value in shown.items():
        if value is not None:
            print(f"{key:<{width}}  {value}")


@click.command("down")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every running machine.")
@click.option(
    "--timeout",
    type=float,
    default=stop.POWER_OFF_DEADLINE_S,
    show_default=True,
    help="Seconds the guest has to power off before QEMU is ended.",
)
def down(*, names: tuple[str, ...], everything: bool, timeout: float) -> None:
    """Power machines off: the guest is asked first, then QEMU, then nobody is."""
    for entry in _pick_several(names, everything):
        stop.power_off(entry, timeout_s=timeout, tell=lambda text: None)
        print(f"{entry.name} is down")


@click.command("kill")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every running machine.")
def kill(*, names: tuple[str, ...], everything: bool) -> None:
    """End machines at once, without asking the guest."""
    for entry in _pick_several(names, everything):
        stop.kill(entry)
        print(f"{entry.name} is gone")


@click.command("wait")
@click.argument("name", required=False)
@click.option("--timeout", type=float, help="Seconds to wait [default: for ever].")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def wait(*, name: str | None, timeout: float | None, as_json: bool) -> None:
    """Wait until a machine ends and say why; status 0 when somebody asked for the end, 1 when not."""
    entry = pick_machine(name)
    ended = stop.wait_for_end(entry, timeout)
    if ended is None:
        raise MachineError(f"'{entry.name}' still runs after {timeout:g} s")
    if as_json:
        print_json({"name": entry.name, "reason": ended.reason, "brief": ended.brief, "expected": ended.expected})
    else:
        print(f"{entry.name}: {ended.brief}")
    if not ended.expected:
        sys.exit(1)


def _pick_several(names: tuple[str, ...], everything: bool) -> list[Entry]:
    if everything:
        if names:
            raise ConfigError("--all and names exclude each other")
        return read_machines()
    return [pick_machine(name) for name in names] or [pick_machine(None)]


def _render_age(entry: Entry) -> str:
    started = entry.record.get("started")
    if not isinstance(started, int | float):
        return "?"
    minutes, seconds = divmod(max(0, int(time.time() - started)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
