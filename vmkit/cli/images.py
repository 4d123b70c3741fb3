"""Verbs about images: build, images."""

import time

import click

from vmkit.cli.show import open_progress, print_json, print_table
from vmkit.image.build import build_image, find_built_image, plan_image
from vmkit.image.config import list_images, load_image


@click.command("build")
@click.argument("image", default="tiny")
@click.option("--update", is_flag=True, help="Look for newer packages first.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def build(*, image: str, update: bool, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Build IMAGE (default: tiny), unless it is in the cache."""
    spec = load_image(image)
    if dry_run:
        print(plan_image(spec).render())
        return
    started_s = time.monotonic()
    with open_progress(quiet=quiet) as tell:
        built = build_image(spec, progress=tell, refresh=update)
    seconds = time.monotonic() - started_s
    if as_json:
        paths = {key: str(getattr(built, key)) for key in ("kernel", "initrd", "manifest")}
        print_json(
            {"name": built.name, "digest": built.digest, "cached": built.cached, "seconds": round(seconds, 3), **paths}
        )
        return
    how = "is in the cache" if built.cached else f"built in {seconds:.1f} s"
    print(f"{built.name} {how}: {built.kernel.parent}")


@click.command("images")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def images(*, as_json: bool) -> None:
    """List the shipped images."""
    specs = list_images()
    states = {spec.name: find_built_image(spec) is not None for spec in specs}
    if as_json:
        print_json(
            [
                {"name": s.name, "description": s.description, "built": states[s.name], "file": str(s.origin)}
                for s in specs
            ]
        )
        return
    rows = [(spec.name, "yes" if states[spec.name] else "no", spec.description) for spec in specs]
    print_table(("IMAGE", "BUILT", "DESCRIPTION"), rows)
