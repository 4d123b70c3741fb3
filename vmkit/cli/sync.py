"""The verb `vmkit sync`: makes a directory equal to another, where one of them is on a machine."""

import sys
from dataclasses import asdict
from functools import partial

import click

from vmkit.cli.show import open_transfer, print_json
from vmkit.cli.transfers import transfer_options, warn_of_skipped
from vmkit.cli.values import complete_endpoints
from vmkit.copy.endpoints import plan_sync
from vmkit.copy.excludes import Excludes, read_patterns
from vmkit.copy.items import Keep
from vmkit.copy.sync_tree import Action, Rules, SyncTally
from vmkit.copy.syncing import Synced, SyncError
from vmkit.copy.syncing import sync as sync_sides
from vmkit.machine.sftp import open_sftp
from vsh.text import clean_line


@click.command("sync")
@click.argument("source", metavar="SRC", shell_complete=complete_endpoints)
@click.argument("destination", metavar="DST", shell_complete=complete_endpoints)
@click.option("--delete", is_flag=True, help="Delete what SRC does not have.")
@click.option("--exclude", "patterns", multiple=True, metavar="PATTERN", help="Leave alone what matches; repeatable.")
@click.option(
    "--exclude-from", "files", multiple=True, metavar="FILE", help="Read patterns from a file, such as .gitignore."
)
@click.option("-c", "--checksum", is_flag=True, help="Compare the data of files, not their times.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and change nothing.")
@transfer_options(verbose="Print each action.")
def sync(  # noqa: PLR0913  (a verb is its options)
    *,
    source: str,
    destination: str,
    delete: bool,
    patterns: tuple[str, ...],
    files: tuple[str, ...],
    checksum: bool,
    dry_run: bool,
    user: str,
    owners: bool,
    xattrs: bool,
    fsync: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Make the directory DST equal to the directory SRC.

    One of them is on a machine, as NAME:PATH; both may be. vmkit copies files whose size or time differs.
    DST gets what SRC contains, and not SRC itself. Without --delete, DST keeps what SRC does not have.

    A PATTERN has the grammar of .gitignore. vmkit neither copies nor deletes what matches.
    """
    sides = plan_sync((source, destination))
    lines = [line for file in files for line in read_patterns(file)] + list(patterns)
    rules = Rules(delete, checksum, dry_run, Excludes(lines) if lines else None)
    is_listed = dry_run or verbose
    actions: list[dict[str, str]] = []
    # The lines and the progress would share the terminal.
    is_shown = is_listed and not as_json and sys.stdout.isatty()
    with open_transfer(quiet=quiet or is_shown or dry_run) as show:
        tally = SyncTally()
        tally.show = show or tally.show
        if is_listed:
            tally.tell = partial(_keep_action, actions) if as_json else _print_action
        failure: SyncError | None = None
        try:
            synced = sync_sides(
                *sides,
                lambda machine: open_sftp(machine, user),
                rules=rules,
                keep=Keep(owners, fsync, xattrs),
                tally=tally,
            )
        except SyncError as error:
            failure, synced = error, error.synced
    warn_of_skipped(synced.skipped)
    if as_json:
        listed = {"actions": actions} if is_listed else {}
        print_json({**_render(synced, failure.failed if failure else 0), "dry_run": dry_run, **listed})
    if failure is not None:
        raise failure


def _keep_action(actions: list[dict[str, str]], action: Action, path: bytes) -> None:
    actions.append({"action": action.value, "path": path.decode(errors="replace")})


def _print_action(action: Action, path: bytes) -> None:
    print(f"{action} {clean_line(path.decode(errors='replace'))}", flush=True)


def _render(synced: Synced, failed: int) -> dict[str, object]:
    return {**asdict(synced), "seconds": round(synced.seconds, 3), "failed": failed}
