"""The verb `vmkit run`: its options. vmkit.oneshot does the work, and is imported while the monitor starts."""

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vmkit.cli.statuses import JudgedCommand
from vmkit.cli.up import add_options
from vmkit.cli.values import complete_images
from vmkit.errors import ConfigError
from vmkit.machine.handover import start_monitor
from vmkit.machine.options import make_spec
from vmkit.machine.source import ANY
from vmkit.oneshot.plan import Wishes, take_words
from vmkit.oneshot.variables import parse_assignment, read_file
from vsh.errors import VshError

MACHINE_FAILED = 125
STDIN = "-"
# Beginnings of what vmkit.roots tells with each start, also where the disk is in the cache.
EACH_TIME = ("reading ", "listing ", "asking for ")
# The machine is a command's alone, and ends with it: no address to remember, no gdb that waits, no recordings, and no
# services beside the command. A reboot has nothing to go back to.
LEFT_OUT = ("cid", "gdb", "init", "record", "user_data", "on_reset", "vmcore", "cores")


# Behind SOURCE all words are the command's, as docker has it.
@click.command(
    "run", cls=JudgedCommand, usage_status=MACHINE_FAILED, context_settings={"allow_interspersed_args": False}
)
@click.option(
    "-i", "--interactive", is_flag=True, help="Pass standard input on. Without -i the command reads an empty input."
)
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option("-e", "--env", "env", multiple=True, metavar="NAME[=VALUE]",
              help="Set a variable, or pass this host's on (repeatable).")  # fmt: skip
@click.option("--env-file", "env_files", multiple=True, metavar="FILE", type=click.Path(path_type=Path),
              help="Set the variables that FILE has, one in each line (repeatable).")  # fmt: skip
@click.option("-w", "--workdir", default="", metavar="DIR", help="Start in this directory of the guest.")
@click.option("-u", "--user", default="", metavar="USER[:GROUP]", help="Run as this user, by name or number.")
@click.option("--entrypoint", metavar="PROGRAM", help="Run this program instead of the image's entry point.")
@click.option("--rm", is_flag=True, help="Accepted, and changes nothing: vmkit always removes the machine of run.")
@add_options(leave_out=LEFT_OUT)
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.argument("source", shell_complete=complete_images)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[COMMAND]...")
def run(
    *,
    source: str,
    words: tuple[str, ...],
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    env_files: tuple[Path, ...],
    workdir: str,
    user: str,
    entrypoint: str | None,
    rm: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Run a command in a machine of its own, as docker run --rm does.

    SOURCE is an image or a root, as for `vmkit up`. COMMAND, all words behind SOURCE, runs there. Without
    it the image's own command runs. Options stand before SOURCE.
    Exits with the command's status, 127 if there is no such command, 126 if it cannot be executed, and 125 if
    the machine failed or an option is wrong.
    """
    try:
        assignments = [one for path in env_files for one in read_file(path, os.environ)]
        assignments += [parse_assignment(text, os.environ) for text in env]
        wishes = Wishes(
            words=take_words(words),
            entrypoint=entrypoint,
            assignments=tuple(assignments),
            working_dir=workdir,
            user=user,
            has_stdin=interactive,
            has_terminal=tty,
        )
        status = _run(source, wishes, options, quiet=quiet)
    except VshError as error:
        _settle(error, words)
        raise
    sys.exit(status)


def _run(source: str, wishes: Wishes, options: dict[str, Any], *, quiet: bool) -> int:
    if wishes.has_stdin and source == STDIN:
        raise ConfigError("with SOURCE - standard input is the archive", hint="leave -i out, or save the archive first")
    if wishes.has_stdin and wishes.has_terminal and not os.isatty(0):
        raise ConfigError("the input device is not a TTY", hint="leave -t out: the command then reads what is piped in")
    spec = make_spec(source, options)
    if spec.image == ANY:
        spec = replace(spec, init="none")
    # The rest of vmkit is imported while the monitor's interpreter starts, as for `up`.
    with contextlib.ExitStack() as stack:
        monitor = stack.enter_context(start_monitor())
        from vmkit.cli.show import open_progress  # noqa: PLC0415
        from vmkit.machine.start import STAGES  # noqa: PLC0415
        from vmkit.oneshot.execute import open_machine, run_command  # noqa: PLC0415

        with open_progress(quiet=quiet) as show:

            def tell(text: str, fraction: float | None) -> None:
                # A script that keeps the command's stderr gets no line of ours where all is in the cache.
                if sys.stderr.isatty() or not (text in STAGES or text.startswith(EACH_TIME)):
                    show(text, fraction)

            machine = stack.enter_context(open_machine(spec, wishes, source, tell, monitor))
        return run_command(machine, wishes)


def _settle(error: VshError, words: tuple[str, ...]) -> None:
    """Gives an error docker's status, and says where options stand."""
    from vmkit.oneshot.execute import find_status  # noqa: PLC0415

    error.status = find_status(error)
    if error.status == 127 and words and words[0].startswith("-") and not error.hint:
        error.hint = f"options of vmkit stand before SOURCE: vmkit run {words[0]} SOURCE"
