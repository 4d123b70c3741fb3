"""The verbs `share`, `unshare` and `shares`: folders of this host in a guest."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from vmkit.cli.show import print_json, print_table
from vmkit.cli.values import complete_machines
from vmkit.errors import ConfigError
from vmkit.machine.running import pick_entry
from vmkit.shares.place import SharedPlace, check_folder, parse_place
from vmkit.shares.registry import LiveShare, find_share, read_shares
from vmkit.shares.start import end_share, start_share
from vmkit.shares.transports import NAMES, render_title


@click.command("share")
@click.argument("name", shell_complete=complete_machines)
@click.argument("folders", nargs=-1, required=True, metavar="HOST[:GUEST][:ro]...")
@click.option(
    "--by",
    type=click.Choice(NAMES),
    metavar="TRANSPORT",
    help=f"The transport: {', '.join(NAMES)} [default: the first that this host and the guest have].",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def share(*, name: str, folders: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Share a folder of this host with a running machine.

    The guest has the folder HOST at GUEST [default: /mnt and the folder's name]. With :ro the guest cannot write to
    it. The share lasts until `vmkit unshare`, or until the machine ends.
    """
    places = [parse_place(text) for text in folders]
    shared = start_shares(pick_entry(name).name, places, by=by or "", quiet=as_json)
    if as_json:
        print_json([asdict(one) for one in shared])


def start_shares(machine: str, places: Sequence[SharedPlace], *, by: str = "", quiet: bool = False) -> list[LiveShare]:
    """Shares folders with a machine, by `by` as in start_share(), and prints each. Raises VshError kinds."""
    shared = []
    for place in places:
        one = start_share(machine, place, by)
        shared.append(one)
        if not quiet:
            print(f"{one.machine} has {one.host} at {one.guest}{_render_mode(one)}, by {render_title(one.transport)}")
            # Of several the last one may fail.
            sys.stdout.flush()
    return shared


def read_places(texts: Sequence[str]) -> list[SharedPlace]:
    """The folders that `up` shares, looked at before it starts a machine. Raises ConfigError, HostError."""
    places = [parse_place(text) for text in texts]
    guests = [place.guest for place in places]
    for place in places:
        check_folder(place)
        if guests.count(place.guest) > 1:
            raise ConfigError(f"two shares have the place {place.guest}", hint="give one another: HOST:GUEST")
    return places


def _render_mode(one: LiveShare) -> str:
    return ", read-only" if one.read_only else ""


@click.command("unshare")
@click.argument("name", shell_complete=complete_machines)
@click.argument("folders", nargs=-1, metavar="[HOST[:GUEST] | GUEST]...")
@click.option("--all", "is_all", is_flag=True, help="End every share of the machine.")
def unshare(*, name: str, folders: tuple[str, ...], is_all: bool) -> None:
    """End the shares of a machine.

    A program that uses the folder in the guest gets an error. HOST is the folder of this host, and GUEST its place in
    the guest.
    """
    if bool(folders) == is_all:
        raise ConfigError("give the folders, or --all", hint=f"vmkit shares {name} prints them")
    shares = read_shares(name)
    if not shares and not is_all:
        # Of a machine that does not run, its name may be the mistake.
        name = pick_entry(name).name
    wanted = shares if is_all else [find_share(shares, name, text) for text in folders]
    for one in wanted:
        end_share(one)
        print(f"{one.machine} has {one.host} no more", flush=True)


@click.command("shares")
@click.argument("name", required=False, shell_complete=complete_machines)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def shares(*, name: str | None, as_json: bool) -> None:
    """List the folders that machines share with this host."""
    found = read_shares(None if name is None else pick_entry(name).name)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        print("no folder is shared", file=sys.stderr)
        return
    rows = [
        (one.machine, one.host, one.guest, "ro" if one.read_only else "rw", render_title(one.transport))
        for one in found
    ]
    print_table(("MACHINE", "HOST", "GUEST", "MODE", "BY"), rows)
