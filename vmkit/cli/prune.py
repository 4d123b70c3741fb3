"""The verb `vmkit prune`: removes what no machine uses, and prints its size."""

import click

from vmkit.cli.show import print_json, print_table
from vmkit.machine.storage import BUSY_S, IDLE_S, add_up, choose_unused, list_holdings, remove

MIB = 1 << 20


@click.command("prune")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also remove what was used within the last week, and not within the last hour.",
)
@click.option("--dry-run", is_flag=True, help="Print what prune would remove, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def prune(*, everything: bool, dry_run: bool, as_json: bool) -> None:
    """Remove what no machine uses, and print its size.

    vmkit removes images, packed roots, packages and snapshots that no machine has used for a week. It makes them
    again when you need them. It also removes what killed programs left. Stored machines, crashes and snapshots
    with a name stay.
    """
    holdings = list_holdings()
    chosen = choose_unused(holdings, idle_s=BUSY_S if everything else IDLE_S)
    if not dry_run:
        chosen = remove(chosen)
    totals = add_up(holdings, chosen)
    freed = sum(total.removed_bytes for total in totals)
    if as_json:
        kinds = [
            {
                "kind": total.kind,
                "count": total.count,
                "bytes": total.size_bytes,
                "removed": total.removed,
                "removed_bytes": total.removed_bytes,
            }
            for total in totals
        ]
        print_json({"dry_run": dry_run, "freed_bytes": freed, "kinds": kinds})
        return
    if totals:
        rows = [
            (
                total.kind,
                str(total.count),
                f"{total.size_bytes / MIB:.1f} MiB",
                str(total.removed),
                f"{total.removed_bytes / MIB:.1f} MiB",
            )
            for total in totals
        ]
        print_table(("KIND", "COUNT", "SIZE", "UNUSED" if dry_run else "REMOVED", "SIZE"), rows)
    print(f"{freed} bytes would be free" if dry_run else f"{freed} bytes are free now")
