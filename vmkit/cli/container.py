"""The verb `container`: containers in a guest."""

import os
import shlex
import sys
from dataclasses import asdict

import click

from vmkit.cli.show import open_progress, print_json, print_table
from vmkit.cli.values import Number, complete_machines
from vmkit.containers.containers import STOP_TIMEOUT_S, Containers
from vmkit.machine.programs import render_environment
from vmkit.machine.running import find_machine
from vsh.crun import check_name
from vsh.text import clean_line

STOP_TIMEOUT_MAX_S = 3600
WORDS = {"allow_interspersed_args": False}


@click.group("container", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", shell_complete=complete_machines)
@click.pass_context
def container(context: click.Context, *, name: str) -> None:
    """Run containers in a machine, without a network or a registry.

    NAME is a machine's name or CID. The guest needs crun: the image `containers` has it. A container has the guest's
    network, so its ports are the guest's ports. `vsh --target_container=CONTAINER` opens a shell in it.
    """
    context.obj = name


@container.command("create", context_settings=WORDS)
@click.argument("container_name", metavar="CONTAINER")
@click.argument("source")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.pass_obj
def create(name: str, *, container_name: str, source: str, words: tuple[str, ...], quiet: bool) -> None:
    """Make a container from a root of this host.

    SOURCE is a folder or a tar by its path, oci:PATH[:TAG], docker-archive:PATH[:TAG], docker://REF, or - for
    standard input. COMMAND, all words behind SOURCE, is what the container runs. Without it the image's own command
    runs. A container without a command, or with a shell alone, waits for sessions.
    """
    check_name(container_name)
    machine = find_machine(name)
    with open_progress(quiet=quiet) as tell:
        Containers(machine).create(container_name, source, words, progress=tell)
    print(f"{machine.name} has the container {container_name}")
    if not quiet:
        print(f"start it:  vmkit container {machine.name} start {container_name}", file=sys.stderr)


@container.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_(name: str, *, as_json: bool) -> None:
    """List the containers of the machine."""
    machine = find_machine(name)
    found = Containers(machine).list_all()
    if as_json:
        print_json([asdict(one) for one in found])
        return
    if not found:
        print(f"{machine.name} has no container", file=sys.stderr)
        return
    rows = [(one.name, one.state, clean_line(one.source), _render_command(one.command)) for one in found]
    print_table(("CONTAINER", "STATE", "SOURCE", "COMMAND"), rows)


def _render_command(command: tuple[str, ...] | None) -> str:
    return "-" if command is None else clean_line(shlex.join(command))


@container.command("start")
@click.argument("container_names", nargs=-1, required=True, metavar="CONTAINER...")
@click.pass_obj
def start(name: str, *, container_names: tuple[str, ...]) -> None:
    """Start containers."""
    machine = find_machine(name)
    for one in container_names:
        Containers(machine).start(one)
        print(f"{one} is running in {machine.name}", flush=True)


@container.command("stop")
@click.argument("container_names", nargs=-1, required=True, metavar="CONTAINER...")
@click.option(
    "--timeout", type=Number("seconds", 0, STOP_TIMEOUT_MAX_S, "seconds"), default=STOP_TIMEOUT_S, show_default=True,
    help="Seconds that its first process has between SIGTERM and SIGKILL.",
)  # fmt: skip
@click.pass_obj
def stop(name: str, *, container_names: tuple[str, ...], timeout: int) -> None:
    """Stop containers. What was written in them stays."""
    machine = find_machine(name)
    for one in container_names:
        Containers(machine).stop(one, timeout)
        print(f"{one} is stopped", flush=True)


@container.command("rm")
@click.argument("container_names", nargs=-1, required=True, metavar="CONTAINER...")
@click.option("-f", "--force", is_flag=True, help="Kill a container that is running.")
@click.pass_obj
def rm(name: str, *, container_names: tuple[str, ...], force: bool) -> None:
    """Remove containers, with all that was written in them."""
    machine = find_machine(name)
    for one in container_names:
        Containers(machine).remove(one, force=force)
        print(f"{one} is removed", flush=True)


@container.command("exec", context_settings=WORDS)
@click.argument("container_name", metavar="CONTAINER")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as this user of the container.")
@click.option("-w", "--workdir", default="", metavar="DIR", help="Start in this directory of the container.")
@click.option("-e", "--env", "env", multiple=True, metavar="NAME=VALUE", help="Set a variable (repeatable).")
@click.pass_obj
def exec_(
    name: str, *, container_name: str, words: tuple[str, ...], user: str, workdir: str, env: tuple[str, ...]
) -> None:
    """Run a command in a running container, or a shell.

    It is `vsh --target_container=CONTAINER -- COMMAND`, which has more options. The exit status is the command's.
    """
    check_name(container_name)
    options = [f"--vm_name={find_machine(name).name}", f"--target_container={container_name}"]
    options += [f"--user={user}"] if user else []
    options += [f"--cwd={workdir}"] if workdir else []
    options += [f"--env={text}" for text in env]
    sys.stdout.flush()
    argv = [sys.executable, "-P", "-m", "vsh", *options, "--", *words]
    # Its own process from here on, with the signals and the terminal of vsh.
    os.execve(sys.executable, argv, render_environment(os.environ))  # noqa: S606
