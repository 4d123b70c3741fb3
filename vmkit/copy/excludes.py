"""Which files a sync leaves alone: patterns in the grammar of .gitignore, read by the library pathspec."""

import os
from collections.abc import Sequence
from pathlib import Path

from vmkit.errors import ConfigError, HostError

# A file of more is not a list that people wrote.
FILE_BYTES_MAX = 1 << 20
COMMENT = "#"


class Excludes:
    """Patterns in their order: the last one that matches a path decides, and `!` takes a path back.

    The caller looks at a directory before the files in it, and at none below one that is excluded.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises ConfigError for a pattern that gitignore's grammar does not have, HostError without pathspec."""
        try:
            # Imported here: most syncs have no patterns.
            import pathspec  # noqa: PLC0415
        except ImportError as error:
            # As in a guest that has vmkit from Debian's packages.
            raise HostError("patterns need the Python package pathspec, which is not installed") from error

        for pattern in patterns:
            try:
                pathspec.GitIgnoreSpec.from_lines([pattern])
            except ValueError as error:
                raise ConfigError(
                    f"the pattern '{pattern}' is not valid", hint="patterns have the grammar of .gitignore"
                ) from error
        self._spec = pathspec.GitIgnoreSpec.from_lines(patterns)

    def has(self, path: bytes, *, is_folder: bool) -> bool:
        """Whether the file of this path is excluded. path: relative to the directory that is synced."""
        # A newline ends a line for regular expressions. It is no part of any pattern, so another character does.
        text = os.fsdecode(path).replace("\n", "\N{REPLACEMENT CHARACTER}")
        return self._spec.match_file(text + "/" if is_folder else text)


def read_patterns(path: str) -> list[str]:
    """Returns the lines of a file of patterns. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path} has more than {FILE_BYTES_MAX >> 20} MiB, too much for a list of patterns")
    return os.fsdecode(data).replace("\r\n", "\n").split("\n")
