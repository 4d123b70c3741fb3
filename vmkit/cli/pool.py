"""The verbs `vmkit pool ...`: start, take, status, stop."""

import sys
import time
from dataclasses import asdict
from typing import Any

import click

from vmkit.cli.show import open_progress, print_json, print_table
from vmkit.cli.up import add_options
from vmkit.cli.values import SECONDS, complete_images, complete_pools
from vmkit.errors import ConfigError, MachineError
from vmkit.machine.options import make_spec
from vmkit.pool.pool import DEFAULT_SIZE, DEFAULT_TAKE_S, NOT_POOLED, RunningPool, find_pool, start_pool
from vmkit.pool.registry import read_pools
from vmkit.pool.words import Status

# The keeper announces no change; a machine takes half a second.
FILL_POLL_S = 0.05


@click.group("pool", context_settings={"help_option_names": ["-h", "--help"]})
def pool() -> None:
    """Keep machines that are ready before you need them.

    A pool restores machines of one image, runs a first command in each, and pauses them. Each is taken once.
    """


@pool.command("start")
@click.argument("image", default="tiny", shell_complete=complete_images)
@click.option("--size", type=int, default=DEFAULT_SIZE, show_default=True, metavar="COUNT", help="Machines that wait.")
@click.option("--name", metavar="NAME", help="Name of the pool [default: the image's name and -pool].")
@add_options(leave_out=NOT_POOLED)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def start(*, image: str, size: int, name: str | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Start a pool, and wait until its first machine can be taken.

    IMAGE is a shipped image's name (default: tiny) or the path of your own recipe.
    The first pool of an image makes a snapshot, which takes some seconds.
    """
    spec = make_spec(image, options)
    with open_progress(quiet=quiet) as tell:
        running = RunningPool(start_pool(spec, size=size, name=name, tell=tell))
        tell("filling the pool", None)
        try:
            status = _await_first(running)
        except BaseException:
            running.stop()
            raise
    if as_json:
        print_json(asdict(status))
        return
    machines = "1 machine" if status.size == 1 else f"{status.size} machines"
    print(f"{status.name} keeps {machines} of {status.image}")
    if not quiet:
        print(f"take one:  vmkit pool take {status.name}", file=sys.stderr)
        print(f"end it:    vmkit pool stop {status.name}", file=sys.stderr)


@pool.command("take")
@click.argument("name", required=False, shell_complete=complete_pools)
@click.option(
    "--timeout", type=SECONDS, default=DEFAULT_TAKE_S, show_default=True, help="Seconds to wait for a machine."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def take(*, name: str | None, timeout: float, as_json: bool) -> None:
    """Take a machine from a pool, and print its name and CID.

    NAME is a pool's name. With one pool running, you can leave it out.
    The machine is yours until `vmkit down` or `vmkit kill`, as after `vmkit up`.
    """
    machine = find_pool(name).take(timeout, is_owned=False)
    if as_json:
        print_json({**machine.record, "shell": ["vsh", "--cid", str(machine.cid)]})
        return
    print(f"{machine.name} is ready: CID {machine.cid}")
    print(f"open a shell:  vsh --cid {machine.cid}", file=sys.stderr)


@pool.command("status")
@click.argument("name", required=False, shell_complete=complete_pools)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(*, name: str | None, as_json: bool) -> None:
    """Show the pools, and how many machines of each can be taken.

    NAME is a pool's name. Without it, vmkit shows all pools.
    """
    pools = [find_pool(name)] if name is not None else [RunningPool(entry) for entry in read_pools()]
    found = [one.status() for one in pools]
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        print("no pool is running; start one: vmkit pool start", file=sys.stderr)
        return
    print_table(("NAME", "IMAGE", "WAITING", "TAKEN"), [_render_row(one) for one in found])
    for one in found:
        if one.error:
            print(f"vmkit: {one.name}: the last machine was not made: {one.error}", file=sys.stderr)


@pool.command("stop")
@click.argument("names", nargs=-1, shell_complete=complete_pools)
@click.option("--all", "everything", is_flag=True, help="End all pools.")
def stop(*, names: tuple[str, ...], everything: bool) -> None:
    """End pools and the machines that wait in them.

    NAMES are names of pools. With one pool running, you can leave it out. Machines that were taken run on.
    """
    if everything and names:
        raise ConfigError("give --all or names, not both")
    pools = [RunningPool(entry) for entry in read_pools()] if everything else [find_pool(n) for n in names or (None,)]
    for one in pools:
        one.stop()
        print(f"{one.name} has ended", flush=True)


def _await_first(running: RunningPool) -> Status:
    while True:
        found = running.status()
        if found.waiting:
            return found
        if found.error:
            raise MachineError(f"no machine of the pool '{found.name}' can be made: {found.error}")
        time.sleep(FILL_POLL_S)


def _render_row(one: Status) -> tuple[str, str, str, str]:
    return one.name, one.image, f"{len(one.waiting)} of {one.size}", str(one.taken)
