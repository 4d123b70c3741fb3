"""The mark of a machine whose guest has its name's keys. It records the inode, size and ctime of each key file.

ssh's ProxyCommand compares it before every connection, so this module imports very little. A key file that was changed,
damaged, replaced or removed since then makes the mark stale.
"""

import os

# The key files that ssh reads, below the folder of a name.
KEY, PUBLIC_KEY, KNOWN_HOSTS = "key", "key.pub", "known_hosts"
# Below a machine's directory, and gone with it.
MARKS = "ssh"
_MAX_CHARACTERS = 1000


def find_mark(directory: str, user: str) -> str:
    """Returns the path of the mark for `user` in a machine's directory."""
    return os.path.join(directory, MARKS, f"mark.{user}")  # noqa: PTH118  (pathlib is slow to import)


def describe_keys(folder: str) -> str:
    """Returns a text for the present key files; empty when one is missing. A new content or mode changes the text."""
    words = []
    for name in (KEY, PUBLIC_KEY, KNOWN_HOSTS):
        try:
            status = os.stat(f"{folder}/{name}")  # noqa: PTH116
        except OSError:
            return ""
        words.append(f"{status.st_ino}:{status.st_size}:{status.st_ctime_ns}")
    return " ".join(words)


def is_current(mark: str, folder: str) -> bool:
    """Whether the guest has the keys that are in the folder now."""
    try:
        with open(mark) as file:  # noqa: PTH123
            text = file.read(_MAX_CHARACTERS)
    except OSError:
        return False
    return bool(text) and text == describe_keys(folder)
