"""Where a root is read and packed: a folder of the cache for unfinished things, and the files that are open meanwhile.

What is in the folder has numbers for names, and goes with it. After a kill the cache's next sweep removes it.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmkit.errors import BuildError
from vmkit.roots.extents import Extent, HostFile, open_whole
from vmkit.roots.limits import Budget, RootLimits

# Layers are open together, each with one descriptor.
_FILES_LIMIT = 600


class Workplace:
    """folder: an empty folder on the cache's file system. budget: what the root may still have."""

    def __init__(self, folder: Path, limits: RootLimits, files: ExitStack) -> None:
        self.folder = folder
        self.budget = Budget(limits)
        self._files = files
        self._opened: list[HostFile] = []
        self._numbers = itertools.count()

    def open(self, path: Path) -> Extent:
        """The whole of a file of the user's. Raises ConfigError where this user cannot read it."""
        if len(self._opened) >= _FILES_LIMIT:
            raise BuildError(f"the root needs more than {_FILES_LIMIT} files at a time")
        file = self._files.enter_context(HostFile(path))
        self._opened.append(file)
        return open_whole(file)

    def keep(self, chunks: Iterable[bytes]) -> Extent:
        """Writes bytes into a file of the folder, and opens it."""
        path = self.folder / str(next(self._numbers))
        with path.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
        return self.open(path)

    def make_folder(self) -> Path:
        """One more empty folder."""
        path = self.folder / str(next(self._numbers))
        path.mkdir()
        return path

    def require_unchanged(self) -> None:
        """Raises BuildError when a file was written to since it was opened."""
        for file in self._opened:
            file.require_unchanged()


@contextmanager
def open_workplace(folder: Path, limits: RootLimits) -> Iterator[Workplace]:
    """Yields a workplace and closes its files at the end."""
    with ExitStack() as files:
        yield Workplace(folder, limits, files)
