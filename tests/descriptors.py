"""Open descriptors: of any process, and those that a block of a test leaves open."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Fails where the block leaves a descriptor open.

    A number alone does not tell: the collector closes the sockets of earlier tests at any time, and the block gets
    their numbers. So a descriptor is its number and its file.
    """
    gc.collect()
    before = read_descriptors()
    yield
    assert read_descriptors() - before == set()


def read_descriptors(process: int | str = "self") -> set[tuple[str, str]]:
    """The open descriptors of a process, with their files: ("3", "socket:[9]")."""
    found = set()
    for name in os.listdir(f"/proc/{process}/fd"):
        # One that is closed meanwhile, like that of the listing itself, is not open.
        with suppress(FileNotFoundError):
            found.add((name, str(Path(f"/proc/{process}/fd/{name}").readlink())))
    return found
