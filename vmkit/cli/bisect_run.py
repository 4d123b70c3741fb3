"""The verb `vmkit bisect-run`."""

import contextlib
import os
import sys
import time
from typing import Any

import click

from vmkit.bisect import judge_start, run_command
from vmkit.cli.show import open_progress
from vmkit.cli.statuses import JudgedCommand
from vmkit.cli.up import add_options
from vmkit.cli.values import SECONDS, complete_images
from vmkit.image.build import build_image
from vmkit.image.recipe.config import load_image
from vmkit.machine.machine import Machine
from vmkit.machine.own_kernel import read_kernel
from vmkit.matrix.plan import DEFAULT_COMMAND_TIMEOUT_S
from vsh.ending import read_ending
from vsh.errors import VshError
from vsh.text import clean_line

SKIP = 125
# They belong to a machine that stays, or that a person looks into.
NOT_BISECTED = ("name", "cid", "boot", "snapshot", "gdb", "on_reset", "vmcore", "cores")


@click.command("bisect-run", cls=JudgedCommand, usage_status=SKIP)
@click.option("--image", default="tiny", show_default=True, metavar="IMAGE", shell_complete=complete_images,
              help="Boot this image: a shipped one's name, or a recipe's path.")  # fmt: skip
@add_options(leave_out=NOT_BISECTED)
@click.option("--deadline", "deadline_s", type=SECONDS, default=DEFAULT_COMMAND_TIMEOUT_S, show_default=True,
              help="Seconds that the command may take; a longer one is bad.")  # fmt: skip
@click.option("--boot-is-test", is_flag=True, help="A kernel that does not boot is bad, and not skipped.")
@click.option("--ktap", "has_ktap", is_flag=True, help="The command prints KTAP: a failed or missing test is bad.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.argument("command", nargs=-1, required=True)
def bisect_run(
    *,
    image: str,
    deadline_s: float,
    boot_is_test: bool,
    has_ktap: bool,
    quiet: bool,
    command: tuple[str, ...],
    **options: Any,
) -> None:
    """Run a command in a fresh machine, for `git bisect run`.

    COMMAND follows after --. It runs in the guest, under the kernel of --kernel or --tree.
    Exits with 0 (good) if the command ended with 0, with 1 (bad) if it failed, took too long, or the guest's kernel
    panicked under it. Everything else is 125 (skip): the machine failed or did not start, or an option is wrong.
    """
    status = SKIP
    try:
        status = _run(image, command, deadline_s, options, boot_is_test=boot_is_test, has_ktap=has_ktap, quiet=quiet)
    except VshError as error:
        _say(f"{error.render('vmkit')}\nvmkit: skip")
    except BaseException as error:
        # Also an interruption: git would take its status for a bad commit, or give up.
        _say(f"vmkit: skip: {error!r}" if isinstance(error, Exception) else "vmkit: skip: interrupted")
    # Not in the handler: what is raised there has the error as its context, and that decides the status.
    sys.exit(status)


def _run(
    image: str,
    command: tuple[str, ...],
    deadline_s: float,
    options: dict[str, Any],
    *,
    boot_is_test: bool,
    has_ktap: bool,
    quiet: bool,
) -> int:
    """Returns the status for git."""
    name = f"bisect-{os.getpid()}"
    machine = Machine(image, name=name, boot=True, **options)
    # What cannot work is refused before a build, which may take minutes.
    read_kernel(machine.spec)
    with open_progress(quiet=quiet) as tell:
        build_image(load_image(machine.spec.image, machine.spec.architecture), progress=tell)
        tell("booting the kernel", None)
    began_s = time.time()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(machine)
        except VshError as error:
            _say(error.render("vmkit"))
            ending = read_ending(name)
            is_ours = ending is not None and ending.at_s >= began_s
            judgement = judge_start(error, ending if is_ours else None, boot_is_test=boot_is_test)
        else:
            judgement = run_command(machine, command, deadline_s, has_ktap=has_ktap)
    _say(f"vmkit: {judgement.verdict.name.lower()}: {clean_line(judgement.why)}")
    return int(judgement.verdict)


def _say(text: str) -> None:
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        # The reader has gone. The interpreter's flush at the end would fail and change the status.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
