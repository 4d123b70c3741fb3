"""Where stored machines are: a folder for each, below the user's data folder. Loads next to nothing.

Each `vmkit up NAME` asks whether NAME is one.
"""

import contextlib
import os
import re
from pathlib import Path

from vmkit.errors import HostError
from vmkit.state import check_own_folder, find_data_folder

MACHINES = "machines"
# The data folder's name and variable, as errors have them.
KIND, VARIABLE = "data", "VMKIT_DATA_DIR"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def find_machines_folder() -> Path:
    """The folder of all stored machines, which need not exist. Raises HostError for a user without a home."""
    return find_data_folder() / MACHINES


def is_stored(word: str) -> bool:
    """Whether a word is the name of a stored machine. Raises HostError where others can write to the data folder."""
    if not _NAME.fullmatch(word) or word.endswith(".toml"):
        return False
    folder = find_present_folder()
    if folder is None or not _is_folder(folder / word):
        return False
    check_own_folder(folder, KIND, VARIABLE)
    return True


def list_names() -> list[str]:
    """The names of all stored machines, also of damaged ones. Raises HostError."""
    folder = find_present_folder()
    if folder is None:
        return []
    check_own_folder(folder, KIND, VARIABLE)
    return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name) and _is_folder(path))


def find_present_folder() -> Path | None:
    """The folder of all stored machines; None where there is none, or no home, or where this user cannot look.

    Most users have no stored machine, and some have no home. Neither may stand in the way of other machines.
    """
    try:
        folder = find_machines_folder()
    except HostError:
        return None
    return folder if _is_folder(folder) and os.access(folder, os.R_OK | os.X_OK, effective_ids=True) else None


def _is_folder(path: Path) -> bool:
    """Python 3.11 raises for a path that it cannot look at."""
    with contextlib.suppress(OSError):
        return path.is_dir()
    return False
