"""`vmkit completion`: prints click's scripts. vmkit.cli.values adds the names of machines and images."""

import importlib

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")
# click's own name for it: _PROGRAM_COMPLETE.
VARIABLE = "_VMKIT_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print a completion script for a shell.

    It completes verbs, options, images and machines, and after NAME: the paths on a machine.
    For bash: `eval "$(vmkit completion bash)"`.
    """
    # It registers itself for bash.
    importlib.import_module("vmkit.cli.bashwords")
    found = get_completion_class(shell)
    assert found is not None
    print(found(context.find_root().command, {}, "vmkit", VARIABLE).source())
