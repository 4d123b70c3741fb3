"""Public functions that join several rooms: build an image, list images, check this host."""

from collections.abc import Callable
from pathlib import Path

from vmkit.architectures import HOST
from vmkit.image.build import BuiltImage, build_image, find_built_image
from vmkit.image.recipe.config import ImageSpec, list_images, load_image
from vmkit.machine.doctor import Check, examine


def build(
    image: str | Path = "tiny",
    *,
    refresh: bool = False,
    lock_file: str | Path | None = None,
    trust: bool = False,
    arch: str = HOST,
    progress: Callable[[str, float | None], None] | None = None,
) -> BuiltImage:
    """Returns the image of a shipped name or a recipe's path, from the cache or built now.

    refresh looks for newer packages first. lock_file allows only the versions it lists. trust trusts the recipe's
    keyring and lock_file from now on: programs that they vouch for run on this host during a build. arch is that of the
    guests: "amd64", "arm64", "riscv64" or "s390x". progress is called with the current step and, where it is known, the
    fraction done (0 to 1). Raises ConfigError, BuildError, HostError.
    """
    lock = None if lock_file is None else Path(lock_file)
    return build_image(load_image(str(image), arch), progress=progress, refresh=refresh, lock_file=lock, trust=trust)


def find_image(image: str | Path = "tiny", *, arch: str = HOST) -> BuiltImage | None:
    """Returns the image if it is in the cache. Builds and fetches nothing. Raises ConfigError."""
    return find_built_image(load_image(str(image), arch))


def images() -> tuple[ImageSpec, ...]:
    """Returns the recipes that vmkit ships."""
    return list_images()


def doctor(image: str = "tiny") -> list[Check]:
    """Checks this host. Returns a list of checks, each with a name, a level, a text and a hint."""
    return examine(image)
