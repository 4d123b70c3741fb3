"""The verbs `vmkit image ...`, and the file of `vmkit build --export`."""

import contextlib
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmkit.cli.show import print_json
from vmkit.errors import ConfigError, HostError
from vmkit.image.build import BuiltImage, Prepared, export_image, find_built_image
from vmkit.image.cache import find_cache_dir, open_cache
from vmkit.image.recipe.config import list_images, load_image

if TYPE_CHECKING:
    from vmkit.image.travel import ImageFile

STANDARD_OUTPUT = "-"


def export(prepared: Prepared, built: BuiltImage, place: str) -> "ImageFile":
    """Writes the file, whole or not at all."""
    if place == STANDARD_OUTPUT:
        if sys.stdout.isatty():
            raise ConfigError(
                "an image is no text for a terminal", hint="name a file, or a program: vmkit build --export - | ..."
            )
        return export_image(prepared, built, sys.stdout.buffer)
    # A rename would put a file in the place of a link, or of /dev/null.
    path = Path(os.path.realpath(place))
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"--export cannot replace {place}, which is no file", hint="use a pipe: vmkit build --export - | ..."
        )
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            exported = export_image(prepared, built, file)
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="name a file on a disk with room") from error
    finally:
        new.unlink(missing_ok=True)
    return exported


@click.group("image")
def image_group() -> None:
    """Bring an image from another host."""


@image_group.command("import")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--sha256", metavar="HASH", help="Refuse any other image than this one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_(*, file: str, sha256: str | None, as_json: bool) -> None:
    """Take an image that `vmkit build --export` wrote.

    FILE is that file; - is standard input. The hash of each file in it is checked before the image is in the cache.
    """
    from vmkit.image.travel import import_image  # noqa: PLC0415 - a build in the cache needs no tar

    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ConfigError(f"--sha256 must have 64 hexadecimal digits, not '{sha256}'")
    with contextlib.ExitStack() as stack:
        try:
            source = sys.stdin.buffer if file == STANDARD_OUTPUT else stack.enter_context(Path(file).open("rb"))
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}") from error
        cache = stack.enter_context(open_cache(find_cache_dir()))
        place = "standard input" if file == STANDARD_OUTPUT else file
        taken = import_image(source, place, cache, sha256)
    if as_json:
        print_json(asdict(taken))
        return
    print(f"{taken.name} for {taken.architecture} is in the cache: {taken.digest}")
    _warn_of_another(taken)


def _warn_of_another(taken: "ImageFile") -> None:
    """A recipe that is another one here makes another image, and the imported one is of no use."""
    if taken.name not in {spec.name for spec in list_images()}:
        return
    found = find_built_image(load_image(taken.name, taken.architecture))
    if found is None or found.digest != taken.digest:
        print(
            f"vmkit: warning: {taken.name} of this vmkit is another image; use the version that exported it",
            file=sys.stderr,
        )
