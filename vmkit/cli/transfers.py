"""What `vmkit cp` and `vmkit sync` share: their options, and the warning of what they do not copy."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from vsh.text import clean_line

F = TypeVar("F", bound=Callable[..., object])


def transfer_options(verbose: str) -> Callable[[F], F]:
    """Declares --user, --owners, --xattrs, --fsync, --json, --verbose and --quiet. verbose: the help of --verbose."""
    options = (
        click.option(
            "--user", default="root", show_default=True, metavar="USER", help="Read and write as this guest user."
        ),
        click.option("--owners", is_flag=True, help="Keep the numbers of user and group."),
        click.option("--xattrs", is_flag=True, help="Keep extended attributes of users; in guests, capabilities too."),
        click.option("--fsync", is_flag=True, help="Write each file to the disk before it gets its name."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("-v", "--verbose", is_flag=True, help=verbose),
        click.option("-q", "--quiet", is_flag=True, help="Show no progress."),
    )

    def declare(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return declare


def warn_of_skipped(paths: Sequence[str]) -> None:
    """Names on stderr what a transfer left out."""
    for path in paths:
        print(f"vmkit: warning: skipped {clean_line(path)}: it is a device, a socket or a FIFO", file=sys.stderr)
