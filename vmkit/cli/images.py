"""Verbs about images: build, images."""

import sys
import time
from pathlib import Path

import click

from vmkit.architectures import ARCHITECTURES, HOST
from vmkit.cli.image import STANDARD_OUTPUT, export
from vmkit.cli.show import open_progress, print_json, print_table
from vmkit.cli.values import complete_images
from vmkit.errors import ConfigError, TrustError
from vmkit.image.build import (
    BuiltImage,
    build_image,
    find_built_image,
    find_drift,
    plan_image,
    prepare,
    update_lock_file,
)
from vmkit.image.debian.lockfile import find_lock_path
from vmkit.image.recipe.config import list_images, load_image


@click.command("build")
@click.argument("image", default="tiny", shell_complete=complete_images)
@click.option(
    "--arch",
    type=click.Choice(tuple(ARCHITECTURES)),
    default=HOST,
    show_default=True,
    help="Architecture of the image's guests.",
)
@click.option("--update", is_flag=True, help="Look for newer packages first.")
@click.option("--locked", is_flag=True, help="Use exactly the packages in the lock file.")
@click.option("--update-lock", is_flag=True, help="Look for newer packages, then write the lock file.")
@click.option("--drift", is_flag=True, help="List the packages that differ from the lock file.")
@click.option(
    "--lock-file", type=click.Path(path_type=Path, dir_okay=False), help="The lock file [default: beside the recipe]."
)
@click.option(
    "--export",
    "export_to",
    type=click.Path(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the image as one file, for `vmkit image import`.",
)
@click.option("--trust", is_flag=True, help="Trust the recipe's keyring and lock file; do not ask.")
@click.option("--dry-run", is_flag=True, help="Print what a build does, and build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def build(
    *,
    image: str,
    arch: str,
    update: bool,
    locked: bool,
    update_lock: bool,
    drift: bool,
    lock_file: Path | None,
    export_to: str | None,
    trust: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build an image, unless it is in the cache.

    IMAGE is a shipped image's name (default: tiny) or the path of your own recipe.
    """
    if locked and (update or update_lock):
        raise ConfigError("--locked excludes --update and --update-lock")
    if export_to == STANDARD_OUTPUT and as_json:
        raise ConfigError("--export - and --json both write to standard output")
    prepared = prepare(load_image(image, arch))
    if dry_run:
        print(plan_image(prepared).render())
        return
    started_s, path = time.monotonic(), lock_file or find_lock_path(prepared.spec)

    def make(*, is_trusted: bool) -> BuiltImage:
        refresh, only = update or update_lock, path if locked else None
        with open_progress(quiet=quiet) as tell:
            return build_image(prepared, progress=tell, refresh=refresh, lock_file=only, trust=is_trusted)

    try:
        built = make(is_trusted=trust)
    except TrustError as error:
        if not _ask_for_trust(error):
            raise
        built = make(is_trusted=True)
    seconds = time.monotonic() - started_s
    exported = None if export_to is None else export(prepared, built, export_to)
    changes = update_lock_file(prepared, path) if update_lock else find_drift(prepared, path) if drift else []
    if as_json:
        paths = {key: str(getattr(built, key)) for key in ("kernel", "initrd", "manifest")}
        print_json(
            {"name": built.name, "digest": built.digest, "cached": built.cached, "seconds": round(seconds, 3), **paths}
            | ({"changes": changes} if update_lock or drift else {})
            | ({} if exported is None else {"exported": exported.sha256})
        )
        return
    # An image on standard output stands alone there.
    out = sys.stderr if export_to == STANDARD_OUTPUT else sys.stdout
    how = "is in the cache" if built.cached else f"built in {seconds:.1f} s"
    print(f"{built.name} {how}: {built.kernel.parent}", file=out)
    if exported is not None:
        print(f"exported, with the SHA-256 {exported.sha256}", file=out)
    if update_lock or drift:
        print(f"{path}: {len(changes)} packages differ" if changes else f"{path}: the same packages", file=out)
        print("".join(f"  {line}\n" for line in changes), end="", file=out)


def _ask_for_trust(error: TrustError) -> bool:
    """Whether a person at a terminal answers yes; False without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    from vsh.text import clean_text  # noqa: PLC0415 - only to ask

    print(clean_text(f"{error.brief}.\n{error.details}"), file=sys.stderr)
    return click.confirm("Trust it from now on?", err=True)


@click.command("images")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
