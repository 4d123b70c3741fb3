"""Verbs about running machines: list, status, pause, resume, down, kill, wait."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkit.cli.show import print_json, print_table, read_wall
from vmkit.cli.values import SECONDS, complete_machines
from vmkit.cli.vsock import read_faults, render_fault
from vmkit.errors import ConfigError, MachineError
from vmkit.machine import pause as pausing
from vmkit.machine import stop
from vmkit.machine.booted import BootState, has_systemd, read_boot, wait_booted
from vmkit.machine.builders import end_builder, read_builders
from vmkit.machine.registry import sweep
from vmkit.machine.running import pick_entry
from vmkit.machine.source import ANY
from vmkit.machine.spec import DEFAULT_TIMEOUT_S
from vmkit.pool.registry import read_pools
from vsh.ending import read_ending
from vsh.errors import VshError
from vsh.registry import Entry, is_for_users, read_machines
from vsh.text import clean_line

if TYPE_CHECKING:
    from vmkit.stored.store import Stored

# A guest that hangs must not hold up what a person asks about it.
CLOCK_DEADLINE_S = 3.0
# systemctl is a program, which an emulated guest that boots starts slowly.
BOOT_DEADLINE_S = 15.0


def render_entry(entry: Entry) -> dict[str, object]:
    """Returns a machine's entry for JSON."""
    return {**entry.record, "directory": entry.directory}


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="List the stored machines that do not run, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(*, everything: bool, as_json: bool) -> None:
    """List the running machines."""
    sweep()
    machines = read_machines()
    stopped = _read_stopped({machine.name for machine in machines}) if everything else []
    if as_json:
        print_json([*map(render_entry, machines), *_render_stopped(stopped)])
        return
    if not machines and not stopped:
        print("no machine is running; start one: vmkit up", file=sys.stderr)
        return
    rows = [
        (
            machine.name,
            str(machine.cid),
            machine.state,
            _render_image(machine),
            str(machine.record.get("accelerator", "")),
            machine.backend,
            f"{machine.record.get('memory_mib', '?')} MiB",
            _render_age(machine),
        )
        for machine in machines
    ]
    rows += [
        (str(one["name"]), "-", str(one["state"]), _render_source(str(one["source"] or ANY)), "-", "-", "-", "-")
        for one in _render_stopped(stopped)
    ]
    print_table(("NAME", "CID", "STATE", "IMAGE", "ACCEL", "BACKEND", "MEMORY", "UP"), rows)


def _read_stopped(running: set[str]) -> "list[Stored]":
    from vmkit.stored.store import read_all_stored, sweep_stored  # noqa: PLC0415 - most hosts have none

    sweep_stored()
    # A machine of an image can have the name of a stored one that does not run.
    return [one for one in read_all_stored() if one.name not in running or not one.is_held]


def _render_stopped(stopped: "list[Stored]") -> list[dict[str, object]]:
    if not stopped:
        return []
    from vmkit.cli.storedrows import render_stored  # noqa: PLC0415 - most hosts have none

    return [render_stored(one) for one in stopped]


@click.command("status")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(*, name: str | None, as_json: bool) -> None:
    """Show what vmkit knows about a machine, and how far its clock is off.

    NAME is a machine's name or CID. With one machine running, you can leave it out.
    """
    entry = pick_entry(name)
    clock, faults, boot = _measure_clock(entry), read_faults(entry), _read_boot(entry)
    if as_json:
        print_json(
            {
                **render_entry(entry),
                "clock": None if clock is None else asdict(clock),
                "faults": [fault._asdict() for fault in faults],
                **({} if boot is None else {"booted": asdict(boot)}),
            }
        )
        return
    shown = {"name": entry.name, "state": entry.state, "cid": entry.cid, **entry.record, "directory": entry.directory}
    shown.pop("schema", None)
    shown["up"] = _render_age(entry)
    if has_systemd(entry):
        shown["boot"] = "the guest's systemd does not answer" if boot is None else boot.render()
    shown["clock"] = None if clock is None else _render_clock(clock)
    shown.pop("started", None)
    # One line per layer: a reason may be a sentence.
    shown |= {f"wall {layer}": state for layer, state in read_wall(entry.record).items()}
    shown.pop("wall", None)
    shown |= {f"container {key}": text for key, text in _render_container(entry)}
    shown.pop("container", None)
    shown |= {f"vsock fault {fault.number}": render_fault(fault) for fault in faults}
    width = max(len(key) for key in shown)
    for key, value in shown.items():
        if value is not None:
            print(f"{key:<{width}}  {value}")


@click.command("pause")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Pause all running machines.")
def pause(*, names: tuple[str, ...], everything: bool) -> None:
    """Stop the processors of machines, until vmkit resume.

    Sessions and forwards stay open, and wait. A paused machine takes no CPU time, and keeps its memory.
    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    """
    entries = _pick_several(names, everything)
    if everything:
        # A machine that waits in a pool is paused already, and one that is saved has a deadline.
        entries = [entry for entry in entries if is_for_users(entry)]
    _do_to_several(entries, pausing.pause, "is paused", "were not paused")


@click.command("resume")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Resume all paused machines.")
def resume(*, names: tuple[str, ...], everything: bool) -> None:
    """Let paused machines run again, and set their clocks.

    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    """
    entries = _pick_several(names, everything)
    if everything:
        entries = [entry for entry in entries if entry.state == "paused"]
    _do_to_several(entries, _resume, "runs", "were not resumed")


@click.command("down")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Shut all running machines down.")
@click.option(
    "--timeout",
    type=SECONDS,
    help="Seconds that the guest gets to shut down, before vmkit ends QEMU [default: 20; 90 where systemd is pid 1].",
)
def down(*, names: tuple[str, ...], everything: bool, timeout: float | None) -> None:
    """Shut machines down: ask the guest, then QEMU, then kill the process.

    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    --all ends the pools as well, and the making of a snapshot in the background.
    """
    _end_makers(everything)
    _do_to_several(
        _pick_several(names, everything),
        lambda entry: stop.power_off(entry, timeout_s=timeout, tell=_tell),
        "is down",
        "did not end",
    )


@click.command("kill")
@click.argument("names", nargs=-1, shell_complete=complete_machines)
@click.option("--all", "everything", is_flag=True, help="Kill all running machines.")
def kill(*, names: tuple[str, ...], everything: bool) -> None:
    """Kill machines at once, without asking the guest.

    NAMES are names or CIDs of machines. With one machine running, you can leave them out.
    --all ends the pools as well, and the making of a snapshot in the background.
    """
    _end_makers(everything)
    _do_to_several(_pick_several(names, everything), stop.kill, "is gone", "did not end")


@click.command("wait")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--booted", is_flag=True, help="Wait instead until the guest's systemd has finished its boot.")
@click.option("--timeout", type=SECONDS, help="Seconds to wait [default: for ever; with --booted 120].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def wait(*, name: str | None, booted: bool, timeout: float | None, as_json: bool) -> None:
    """Wait until a machine ends, and print why.

    A reboot of a machine with --on-reset=restart is no end, and is told on stderr.
    After an unexpected end it also prints the last lines of the console, and of the kernel's log in its memory.
    NAME is a machine's name or CID. With one machine running, you can leave it out.
    Exits with 0 after an end on request, and with 1 after an unexpected end.
    With --booted it exits with 0 once the guest has booted, and with 1 if units of its systemd have failed.
    """
    entry = pick_entry(name)
    if booted:
        _await_boot(entry, DEFAULT_TIMEOUT_S if timeout is None else timeout, as_json=as_json)
        return
    ended = stop.wait_for_end(entry, timeout, lambda: _tell(f"the guest of '{entry.name}' reboots"))
    if ended is None:
        raise MachineError(f"'{entry.name}' still runs after {timeout:g} s")
    ending = None if ended.expected else read_ending(entry.name, entry.pid)
    details = ending.details if ending is not None else ""
    if as_json:
        answer = {"name": entry.name, "reason": ended.reason, "brief": ended.brief, "expected": ended.expected}
        print_json({**answer, "details": details})
    else:
        print(f"{entry.name}: {ended.brief}", flush=True)
        if details:
            print(details, file=sys.stderr)
    if not ended.expected:
        sys.exit(1)


def _await_boot(entry: Entry, timeout_s: float, *, as_json: bool) -> None:
    state = wait_booted(entry, timeout_s)
    if as_json:
        print_json({"name": entry.name, "booted": asdict(state)})
    else:
        print(f"{entry.name} has booted: {state.render()}", flush=True)
    if not state.is_good:
        sys.exit(1)


def _do_to_several(entries: list[Entry], do: Callable[[Entry], None], done: str, not_done: str) -> None:
    """Does something to one machine after another, also after a failure. Raises one MachineError for all failures.

    done, not_done: what is printed after a machine's name, and after the number of failures.
    """
    failures: list[VshError] = []
    for entry in entries:
        try:
            do(entry)
        except VshError as error:
            failures.append(error)
        else:
            print(f"{entry.name} {done}", flush=True)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise MachineError(
            f"{len(failures)} machines {not_done}", details="\n".join(f"{e.brief}; {e.hint}" for e in failures)
        )


def _end_makers(everything: bool) -> None:
    """Ends what makes machines: a pool would make another one for each that ends."""
    for builder in read_builders() if everything else []:
        end_builder(builder)
        print(f"the snapshot of {builder.image} is no longer made", flush=True)
    for pool in read_pools() if everything else []:
        from vmkit.pool.pool import RunningPool  # noqa: PLC0415 - few hosts have a pool

        RunningPool(pool).stop()
        print(f"{pool.name} has ended", flush=True)


def _resume(entry: Entry) -> None:
    resumed = pausing.resume(entry)
    if resumed.late_ms is None:
        _tell(f"warning: the clock of '{entry.name}' may be late: {resumed.why}")


def _measure_clock(entry: Entry) -> pausing.ClockOffset | None:
    """None for a guest that does not answer, or is not ready."""
    if entry.state != "ready":
        return None
    try:
        return pausing.measure_clock(entry, CLOCK_DEADLINE_S)
    except MachineError:
        return None


def _read_boot(entry: Entry) -> BootState | None:
    """What a guest's systemd says; None for a guest without, and for one that does not answer."""
    if entry.state != "ready" or not has_systemd(entry):
        return None
    try:
        state = read_boot(entry, BOOT_DEADLINE_S)
    except VshError:
        return None
    return state if state.state else None


def _render_clock(clock: pausing.ClockOffset) -> str:
    side = "ahead of" if clock.ahead_ms > 0 else "behind"
    return f"{abs(clock.ahead_ms):.1f} ms {side} the host's, measured to {clock.error_ms:.1f} ms"


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


def _render_image(entry: Entry) -> str:
    """The image; of a root that the user gave its name, a path without its folders."""
    image, source = str(entry.record.get("image", "")), str(entry.record.get("source") or "")
    if image != ANY or not source:
        return image
    return _render_source(source)


def _render_source(source: str) -> str:
    return clean_line(Path(source).name if source.startswith("/") else source)


def _render_container(entry: Entry) -> Iterator[tuple[str, str]]:
    """What a container image says of its program, as words for a shell: its maker wrote it."""
    for key, value in entry.container.items():
        text = shlex.join(map(str, value)) if isinstance(value, list) else str(value)
        if text:
            yield key, clean_line(text)


def _render_age(entry: Entry) -> str:
    started = entry.record.get("started")
    if not isinstance(started, int | float):
        return "?"
    minutes, seconds = divmod(max(0, int(time.time() - started)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
