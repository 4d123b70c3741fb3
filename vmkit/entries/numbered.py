"""Entries whose names are numbers, the lowest free one each: of lasting forwards, and of shares.

The process that keeps the thing makes its entry, and holds its lock for life.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vmkit.entries.entry import NewEntry, discard, make_entry, sweep_all, write_record
from vmkit.entries.folder import explain_errors, hold_registry, open_runtime_directory
from vmkit.errors import HostError

# More than anybody has.
MAX_NUMBER = 10_000


@contextlib.contextmanager
def make_numbered(kind: str) -> Iterator["Numbered"]:
    """Makes an entry of this process. Others do not see it before publish(). The end of the block removes it.

    kind: the folder of such entries, below the runtime directory.
    """
    root = open_runtime_directory()
    folder = root / kind
    with explain_errors(root):
        folder.mkdir(mode=0o700, exist_ok=True)
        with hold_registry(root):
            sweep_all(folder)
            made = contextlib.ExitStack()
            entry = made.enter_context(make_entry(folder, str(os.getpid())))
    with made:
        try:
            yield Numbered(entry)
        finally:
            discard(entry.directory)


class Numbered:
    """Our own entry."""

    def __init__(self, entry: NewEntry) -> None:
        self._entry = entry

    @property
    def directory(self) -> Path:
        """Its present path."""
        return self._entry.directory

    @contextlib.contextmanager
    def choose_number(self) -> Iterator[int]:
        """Holds the lowest free number for the block. Raises HostError."""
        folder = self.directory.parent
        # Held: a sweep that has looked at a number's entry must not find ours there when it removes that entry.
        with explain_errors(folder.parent), hold_registry(folder.parent):
            taken = set(os.listdir(folder))
            number = next((number for number in range(1, MAX_NUMBER) if str(number) not in taken), MAX_NUMBER)
            if number == MAX_NUMBER:
                raise HostError(f"all {MAX_NUMBER - 1} numbers are taken in {folder}")
            yield number

    def publish(self, number: int, record: str, content: Mapping[str, object]) -> None:
        """Shows the entry to others, with its record. The caller has chosen the number. Raises OSError."""
        write_record(self.directory / record, content)
        self._entry.publish(str(number))
