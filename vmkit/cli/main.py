"""The `vmkit` command: its verbs, and their common options. It imports a verb's module when the verb is used."""

import importlib
import logging
import os
import sys

import click

from vsh.registry import describe_detour
from vshd.wire.version import __version__

# Verbs by task, in the order of --help: what a newcomer needs first.
TASKS = {
    "Machines": {
        "up": "vmkit.cli.up:up",
        "run": "vmkit.cli.run:run",
        "create": "vmkit.cli.stored:create",
        "rm": "vmkit.cli.stored:rm",
        "list": "vmkit.cli.machines:list_",
        "status": "vmkit.cli.machines:status",
        "wait": "vmkit.cli.machines:wait",
        "pause": "vmkit.cli.machines:pause",
        "resume": "vmkit.cli.machines:resume",
        "down": "vmkit.cli.machines:down",
        "kill": "vmkit.cli.machines:kill",
    },
    "Files": {
        "cp": "vmkit.cli.cp:cp",
        "sync": "vmkit.cli.sync:sync",
        "share": "vmkit.cli.share:share",
        "unshare": "vmkit.cli.share:unshare",
        "shares": "vmkit.cli.share:shares",
    },
    "What a machine prints": {
        "logs": "vmkit.cli.logs:logs",
        "console": "vmkit.cli.console:console",
        "dmesg": "vmkit.cli.dmesg:dmesg",
        "crashes": "vmkit.cli.crashes:crashes",
    },
    "Ways into a guest, beside vsh": {
        "guest-exec": "vmkit.cli.guest_exec:guest_exec",
        "forward": "vmkit.cli.forward:forward",
        "rpc": "vmkit.cli.rpc:rpc",
        "ssh": "vmkit.cli.ssh:ssh",
        "ssh-config": "vmkit.cli.ssh:ssh_config",
        "container": "vmkit.cli.container:container",
    },
    "Images, snapshots and pools": {
        "build": "vmkit.cli.images:build",
        "image": "vmkit.cli.image:image_group",
        "images": "vmkit.cli.images:images",
        "snapshot": "vmkit.cli.snapshot:snapshot",
        "pool": "vmkit.cli.pool:pool",
    },
    "Tests and measurements": {
        "matrix": "vmkit.cli.matrix:matrix",
        "ktap": "vmkit.cli.ktap:ktap",
        "bisect-run": "vmkit.cli.bisect_run:bisect_run",
        "bench": "vmkit.cli.bench:bench",
    },
    "The vsock device": {
        "vsock": "vmkit.cli.vsock:vsock",
        "device": "vmkit.cli.device:device",
    },
    "This host": {
        "doctor": "vmkit.cli.doctor:doctor",
        "prune": "vmkit.cli.prune:prune",
        "docker": "vmkit.cli.docker:docker",
        "completion": "vmkit.cli.completion:completion",
    },
}
# A summary is the first sentence of the verb's help; a test holds that none is longer.
MAX_SUMMARY_CHARACTERS = 72
# These look for no running machine.
WITHOUT_MACHINES = (
    "create",
    "build",
    "image",
    "images",
    "snapshot",
    "device",
    "doctor",
    "docker",
    "completion",
    "ktap",
    "crashes",
)
# click's variable: a shell asks for completions.
COMPLETION_VARIABLE = "_VMKIT_COMPLETE"
VERBS = {name: place for verbs in TASKS.values() for name, place in verbs.items()}


class Verbs(click.Group):
    """A group that imports a verb only for its use: `vmkit list` does not import the code that builds images."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Prints one section for each task, and cuts no summary."""
        width = max(map(len, VERBS))
        for task, verbs in TASKS.items():
            with formatter.section(task):
                rows = [(name.ljust(width), self._summarise(ctx, name)) for name in verbs]
                formatter.write_dl(rows)

    def _summarise(self, ctx: click.Context, name: str) -> str:
        command = self.get_command(ctx, name)
        return "" if command is None else command.get_short_help_str(limit=MAX_SUMMARY_CHARACTERS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


if COMPLETION_VARIABLE in os.environ:
    importlib.import_module("vmkit.cli.bashwords")


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vmkit")
@click.option("--debug", is_flag=True, envvar="VMKIT_DEBUG", help="Print each command that vmkit runs, and tracebacks.")
@click.pass_context
def vmkit(context: click.Context, *, debug: bool) -> None:
    """A Linux VM and a shell in it: no network, no keys, no root, no KVM needed.

    `vmkit up` starts a machine. `vsh` opens a shell in it. `vmkit VERB --help` explains a verb.
    """
    # The environment is where __main__ looks: an option of a verb that failed is known nowhere else.
    os.environ["VMKIT_DEBUG"] = "1" if debug else ""
    level, layout = (
        (logging.DEBUG, "%(name)s: %(message)s") if debug else (logging.WARNING, "vmkit: warning: %(message)s")
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_CleanFormatter(layout))
    logging.basicConfig(level=level, handlers=[handler])
    if context.invoked_subcommand not in WITHOUT_MACHINES:
        detour = describe_detour()
        if detour:
            logging.getLogger("vmkit").warning("%s", detour)


class _CleanFormatter(logging.Formatter):
    """Removes control characters from log records, which may have text of a recipe."""

    def format(self, record: logging.LogRecord) -> str:
        from vsh.text import clean_text  # noqa: PLC0415 - only where there is something to print

        return clean_text(super().format(record))
