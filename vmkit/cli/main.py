"""The `vmkit` command: its verbs, and what holds for all of them. A verb's module is imported when it is used."""

import importlib
import logging
import os
import sys

import click

from vshd.wire.version import __version__

# In the order of --help: what a newcomer needs first.
VERBS = {
    "up": "vmkit.cli.up:up",
    "list": "vmkit.cli.machines:list_",
    "status": "vmkit.cli.machines:status",
    "logs": "vmkit.cli.look:logs",
    "console": "vmkit.cli.look:console",
    "wait": "vmkit.cli.machines:wait",
    "down": "vmkit.cli.machines:down",
    "kill": "vmkit.cli.machines:kill",
    "forward": "vmkit.cli.forward:forward",
    "bench": "vmkit.cli.bench:bench",
    "ssh": "vmkit.cli.ssh:ssh",
    "ssh-config": "vmkit.cli.ssh:ssh_config",
    "doctor": "vmkit.cli.doctor:doctor",
    "build": "vmkit.cli.images:build",
    "images": "vmkit.cli.images:images",
    "matrix": "vmkit.cli.matrix:matrix",
    "docker": "vmkit.cli.docker:docker",
    "completion": "vmkit.cli.completion:completion",
}


class Verbs(click.Group):
    """A group that imports a verb only when it is asked for: `vmkit list` need not know how images are built."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vmkit")
@click.option("--debug", is_flag=True, envvar="VMKIT_DEBUG", help="Show every command run, and tracebacks.")
def vmkit(*, debug: bool) -> None:
    """A Linux VM and a shell in it: no network, no keys, no root, no KVM needed.

    `vmkit up && vsh --cid 3`
    """
    # The environment is where __main__ looks: an option of a verb that failed is known nowhere else.
    os.environ["VMKIT_DEBUG"] = "1" if debug else ""
    if debug:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")
