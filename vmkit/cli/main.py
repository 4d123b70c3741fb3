"""The `vmkit` command: its verbs, and what holds for all of them."""

import logging
import os
import sys

import click

from vmkit.cli import images, look, machines
from vmkit.cli.up import up
from vshd.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vmkit")
@click.option("--debug", is_flag=True, envvar="VMKIT_DEBUG", help="Show every command run, and tracebacks.")
def vmkit(*, debug: bool) -> None:
    """A Linux VM and a shell in it: no network, no keys, no root, no KVM needed.

    `vmkit up && vsh --cid 3`
    """
    if debug:
        os.environ["VMKIT_DEBUG"] = "1"
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(name)s: %(message)s")


for verb in (
    up,
    machines.list_,
    machines.status,
    look.logs,
    look.console,
    machines.wait,
    machines.down,
    machines.kill,
    images.doctor,
    images.build,
    images.images,
):
    vmkit.add_command(verb)
