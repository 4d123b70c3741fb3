"""Where stored machines are: a folder for each, below the user's data folder. Loads next to nothing.

Each `vmkit up NAME` asks whether NAME is one.
"""

import re
from pathlib import Path

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
    folder = find_machines_folder()
    if not (folder / word).is_dir():
        return False
    check_own_folder(folder, KIND, VARIABLE)
    return True


def list_names() -> list[str]:
    """The names of all stored machines, also of damaged ones. Raises HostError."""
    folder = find_machines_folder()
    if not folder.is_dir():
        return []
    check_own_folder(folder, KIND, VARIABLE)
    return sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
