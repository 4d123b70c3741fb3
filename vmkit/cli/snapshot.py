"""The verbs `vmkit snapshot ...`: make, save, list, show, rm, prune."""

import sys
import time
from typing import Any

import click

from vmkit.cli.show import open_progress, print_json, print_table
from vmkit.cli.up import add_options
from vmkit.cli.values import complete_images, complete_snapshots
from vmkit.errors import ConfigError
from vmkit.machine.builders import read_builders
from vmkit.machine.options import OPTIONS, make_spec
from vmkit.machine.restore import open_store
from vmkit.machine.save import Made, make_snapshot
from vmkit.machine.spec import MachineSpec
from vmkit.snapshots.boots import read_boots
from vmkit.snapshots.key import SHOWN_DIGITS
from vmkit.snapshots.store import Snapshot, read_snapshot
from vmkit.stored.place import is_stored
from vsh.text import clean_text

# They belong to one running machine, or to a boot that nothing is saved of.
NOT_SAVED = (
    *("name", "cid", "arch", "token", "boot", "snapshot", "gdb"),
    *("init", "partition", "root_from", "record", "rwdisks", "user_data", "on_reset", "vmcore", "cores"),
)
MIB = 1 << 20
# The states of a snapshot.
MADE, BEING_MADE, FAILED = "made", "being made", "failed"


@click.group("snapshot", context_settings={"help_option_names": ["-h", "--help"]})
def snapshot() -> None:
    """Save booted machines, so that `vmkit up` starts them fast.

    `vmkit up` uses the snapshot of exactly its image, its options, this QEMU and this vmkit, if there is one.
    """


@snapshot.command("make")
@click.argument("image", default="tiny", shell_complete=complete_images)
@add_options(leave_out=NOT_SAVED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def make(*, image: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Boot a machine, save it, and end it, unless its snapshot is there.

    IMAGE is a shipped image's name (default: tiny), the path of your own recipe, or a root of yours, as for
    `vmkit up`. Give the options that you give to `vmkit up`.
    """
    with open_progress(quiet=quiet) as tell:
        made = make_snapshot(_read_spec(image, options), tell=tell)
    _print_made(made, as_json=as_json)


@snapshot.command("save")
@click.argument("name")
@click.option(
    "--image", default="tiny", show_default=True, metavar="IMAGE", shell_complete=complete_images, help="Image to boot."
)
@click.option(
    "--run", "commands", multiple=True, metavar="COMMAND", help="Run this in the guest's sh before (repeatable)."
)
@add_options(leave_out=NOT_SAVED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def save(*, name: str, image: str, commands: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Boot a machine, prepare it by commands, and save it under NAME.

    `vmkit up --snapshot NAME` starts from it.
    """
    with open_progress(quiet=quiet) as tell:
        made = make_snapshot(_read_spec(image, options), name=name, commands=commands, tell=tell)
    _print_made(made, as_json=as_json)


@snapshot.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_(*, as_json: bool) -> None:
    """List the snapshots, and those that are made in the background or were not made."""
    everything = [render_snapshot(one) for one in open_store().read_all()]
    everything += _render_unmade({one["key"] for one in everything if not one["named"]})
    if as_json:
        print_json(everything)
        return
    if not everything:
        print("there is no snapshot; make one: vmkit snapshot make", file=sys.stderr)
        return
    rows = [
        (
            one["name"],
            one["image"],
            f"{one['memory_mib']} MiB",
            f"{one['size_bytes'] // MIB} MiB",
            one["state"] if one["made"] is None else _render_age(one["made"]),
        )
        for one in everything
    ]
    print_table(("NAME", "IMAGE", "MEMORY", "ON DISK", "MADE"), rows)
    sys.stdout.flush()
    for one in everything:
        if one["error"] is not None:
            print(f"{one['name']} was not made: {clean_text(one['error'])}", file=sys.stderr)


@snapshot.command("show")
@click.argument("name", shell_complete=complete_snapshots)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(*, name: str, as_json: bool) -> None:
    """Show what a snapshot depends on.

    NAME is its name, or the first digits of its key.
    """
    found = read_snapshot(open_store().pick(name))
    value = render_snapshot(found)
    if as_json:
        print_json(value | {"facts": dict(found.record.facts)})
        return
    facts = found.record.facts
    value |= {"QEMU": " ".join(map(str, facts.get("qemu", []))), "accelerator": facts.get("accelerator", "")}
    for key, text in value.items():
        print(f"{key:<13}{text}")


@snapshot.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=complete_snapshots)
def rm(*, names: tuple[str, ...]) -> None:
    """Remove snapshots.

    NAMES are names, or the first digits of keys. Machines that started from a snapshot go on.
    """
    store = open_store()
    folders = [store.pick(name) for name in names]
    for name, folder in zip(names, folders, strict=True):
        store.remove(folder)
        print(f"the snapshot {name} is gone", flush=True)


@snapshot.command("prune")
@click.option("--all", "everything", is_flag=True, help="Remove every snapshot that `make` made.")
def prune(*, everything: bool) -> None:
    """Remove made snapshots that are old or too many.

    They are those that no machine used for two weeks, and the oldest above 4 GiB. Those that `save` made stay
    until you remove them.
    """
    store = open_store()
    gone = store.prune(max_bytes=-1) if everything else store.prune()
    print(f"{len(gone)} snapshots are gone" if gone else "nothing to remove")


def render_snapshot(one: Snapshot) -> dict[str, Any]:
    """Returns a snapshot for JSON."""
    return {
        "name": one.name,
        "named": one.is_named,
        "key": one.record.key,
        "image": one.record.image,
        "memory_mib": one.record.memory_mib,
        "size_bytes": one.record.file_bytes,
        "made": one.record.made,
        "directory": str(one.folder),
        "state": MADE,
        "error": None,
    }


def _render_unmade(made: set[str]) -> list[dict[str, Any]]:
    """Those that are being made in the background, and those of which that failed. made: keys of no interest."""
    store = open_store()
    builders = [one for one in read_builders() if one.key not in made]
    failed = read_boots(store.folder)
    for key in {*made, *(one.key for one in builders)}:
        failed.pop(key, None)
    states: list[tuple[str, str, int, str, str | None]]
    states = [(one.key, one.image, one.memory_mib, BEING_MADE, None) for one in builders]
    states += [(key, one.image, one.memory_mib, FAILED, one.error) for key, one in failed.items() if one.error]
    return [
        {
            "name": key[:SHOWN_DIGITS],
            "named": False,
            "key": key,
            "image": image,
            "memory_mib": memory_mib,
            "size_bytes": 0,
            "made": None,
            "directory": str(store.find_made(key)),
            "state": state,
            "error": error,
        }
        for key, image, memory_mib, state, error in states
    ]


def _read_spec(image: str, options: dict[str, Any]) -> MachineSpec:
    known = {option.name for option in OPTIONS} - set(NOT_SAVED)
    if is_stored(image):
        # As for `vmkit up`, where a stored machine comes before an image.
        raise ConfigError(
            f"vmkit cannot save the machine '{image}': it keeps what its guest writes",
            hint=f"give the root that it was created from, or start it: vmkit up {image}",
        )
    unknown = options.keys() - known
    if unknown:
        raise ConfigError(f"a snapshot knows no option {min(unknown)}")
    return make_spec(image, options)


def _print_made(made: Made, *, as_json: bool) -> None:
    one = made.snapshot
    if as_json:
        print_json(render_snapshot(one) | {"was_there": made.was_there, "seconds": round(made.seconds, 3)})
        return
    how = "is there already" if made.was_there else f"made in {made.seconds:.1f} s"
    print(f"snapshot {one.name} of {one.record.image} {how}: {one.record.file_bytes // MIB} MiB on disk")


def _render_age(made: float) -> str:
    minutes = max(0, int(time.time() - made)) // 60
    return f"{minutes // 60}h{minutes % 60:02}m ago" if minutes >= 60 else f"{minutes}m ago"
