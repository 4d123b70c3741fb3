"""The verb `vmkit cp`: copies files and directories in and out of machines."""

import sys
from dataclasses import asdict

import click

from vmkit.cli.show import open_transfer, print_json
from vmkit.cli.transfers import transfer_options, warn_of_skipped
from vmkit.cli.values import complete_endpoints
from vmkit.copy.copying import Copied, CopyError, copy
from vmkit.copy.endpoints import plan_copy
from vmkit.copy.items import Keep
from vmkit.errors import ConfigError
from vmkit.machine.sftp import open_sftp
from vsh.text import clean_line


@click.command("cp")
@click.argument("paths", nargs=-1, required=True, metavar="SRC... DST", shell_complete=complete_endpoints)
@click.option("-r", "-R", "--recursive", is_flag=True, help="Accepted, as in cp; vmkit always copies directories.")
@transfer_options(verbose="Print each file and, at the end, how the files went.")
def cp(
    *,
    paths: tuple[str, ...],
    recursive: bool,
    user: str,
    owners: bool,
    xattrs: bool,
    fsync: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Copy files and directories in and out of machines.

    NAME:PATH is a path on a machine. NAME is its name or CID; with one machine running, :PATH is enough.
    A relative PATH begins at the user's home. Both sides may be machines.
    `-` is standard input or output. Write a local path with a colon as ./a:b.

    A copy keeps modes, times, symbolic links and holes, and hard links of this host.
    A file gets its name when it is whole, so an error leaves the old file unchanged.
    """
    sources, destination = plan_copy(paths)
    if as_json and destination.is_stream:
        raise ConfigError("--json does not go with `-` as the destination")
    keep = Keep(owners, fsync, xattrs)
    report = None
    if verbose:

        def report(source: str, copied: str) -> None:
            print(f"{clean_line(source)} -> {clean_line(copied)}", file=sys.stderr, flush=True)

    # Progress and the content, or the names, would share the terminal.
    is_shown = verbose or (destination.is_stream and sys.stdout.isatty())
    with open_transfer(quiet=quiet or is_shown) as show:
        try:
            copied = copy(
                sources, destination, lambda machine: open_sftp(machine, user), keep=keep, show=show, report=report
            )
        except CopyError as error:
            failure: CopyError | None = error
            copied = error.copied
        else:
            failure = None
    warn_of_skipped(copied.skipped)
    if verbose:
        print(_describe(copied), file=sys.stderr)
    if as_json:
        print_json(_render(copied, failure.failed if failure else 0))
    if failure is not None:
        raise failure


def _describe(copied: Copied) -> str:
    """How the files went, for --verbose."""
    counts = f"{copied.files} files, {copied.bytes} bytes in {copied.seconds:.2f} s"
    return f"{counts}; {copied.whole} small files went whole in one message"


def _render(copied: Copied, failed: int) -> dict[str, object]:
    return {**asdict(copied), "seconds": round(copied.seconds, 3), "failed": failed}
