"""Finds what travels with vmkit: recipes, templates and the guest daemon's sources.

From a checkout they are the top-level folders a user reads and edits; from an installed wheel they are vmkit/data/.
Knows nothing of what is inside them.
"""

from pathlib import Path

import vmkit
import vshd
from vmkit.errors import HostError

# The wheel's copy, laid there by force-include in pyproject.toml.
_INSTALLED = Path(vmkit.__file__).parent / "data"
_CHECKOUT = Path(vmkit.__file__).parent.parent


def find_images_dir() -> Path:
    """The folder of the shipped recipes, one NAME.toml per image."""
    return _find_shipped("images")


def find_templates_dir() -> Path:
    """The folder of the shipped templates, one sub-folder per image family."""
    return _find_shipped("templates")


def find_vshd_dir() -> Path:
    """The folder of the guest daemon's sources, which is copied into the guest as it is."""
    return Path(vshd.__file__).parent


def find_service_dir(folder: str) -> Path:
    """The folder of a service for guests, vmkit.image.services."""
    return Path(vmkit.__file__).parent / folder


def find_builder_sources() -> tuple[Path, ...]:
    """The modules of vmkit.image: a changed builder makes another image, so they are part of an image's digest."""
    return tuple(sorted(Path(__file__).parents[1].rglob("*.py")))


def _find_shipped(folder: str) -> Path:
    for base in (_INSTALLED, _CHECKOUT):
        if (base / folder).is_dir():
            return base / folder
    raise HostError(
        f"vmkit's own {folder} folder is missing",
        details=f"looked in {_INSTALLED / folder} and {_CHECKOUT / folder}",
        hint="install vmkit again: pip install --force-reinstall vmkit-vsh",
    )
