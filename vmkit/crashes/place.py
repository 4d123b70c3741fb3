"""Where crashes are kept: below the user's data folder. Loads next to nothing, because each `vmkit up` asks."""

from pathlib import Path

from vmkit.errors import HostError
from vmkit.state import check_own_folder, find_data_folder
from vmkit.stored.place import KIND, VARIABLE

CRASHES = "crashes"


def find_crashes_folder() -> Path:
    """The folder of all crashes, which need not exist. Raises HostError for a user without a home."""
    return find_data_folder() / CRASHES


def require_crashes_folder() -> Path:
    """The same, for a program that writes there. Raises HostError where others can write to it, too."""
    check_own_folder(find_data_folder(), KIND, VARIABLE)
    return find_crashes_folder()


def find_usable_folder() -> Path | None:
    """The same; None where nothing can be kept: a machine runs all the same."""
    try:
        return require_crashes_folder()
    except HostError:
        return None
