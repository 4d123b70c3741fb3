"""The verb about this host: doctor."""

import sys

import click

from vmkit.cli.show import open_progress, print_json
from vmkit.machine.doctor import Level, can_start, examine


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(*, as_json: bool) -> None:
    """Check what this host can do, and what `up` will use.

    Prints each choice with its reason. Exits with 1 if `up` cannot work here.
    """
    with open_progress(quiet=as_json) as tell:
        tell("looking at this host", None)
        checks = examine()
    works = can_start(checks)
    if as_json:
        print_json(
            {
                "works": works,
                "checks": [{"name": c.name, "level": c.level.value, "text": c.text, "hint": c.hint} for c in checks],
            }
        )
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            mark = {Level.OK: "ok      ", Level.FALLBACK: "fallback", Level.BROKEN: "BROKEN  "}[check.level]
            print(f"{mark}  {check.name:<{width}}  {check.text}")
            if check.hint:
                print(f"{'':8}  {'':<{width}}  hint: {check.hint}")
        print("vmkit up will work here" if works else "vmkit up cannot work here yet")
    if not works:
        sys.exit(1)
