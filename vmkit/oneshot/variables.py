"""The variables of a command, as docker takes them: NAME=VALUE, NAME for this host's own value, and files of them.

Pure but for reading a file, which has a limit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vmkit.errors import ConfigError

# More than a kernel gives any program (MAX_ARG_STRLEN of linux/binfmts.h, times some).
FILE_BYTES_MAX = 1 << 20
_BOM = "\ufeff"
_BLANK = re.compile(r"\s")
# None: the variable is taken out of those of the image.
Assignment = tuple[str, str | None]


def parse_assignment(text: str, environ: Mapping[str, str]) -> Assignment:
    """A value of --env. A name alone has this host's value, and takes the variable out where there is none.

    Raises ConfigError.
    """
    name, equals, value = text.partition("=")
    if not name or "\0" in text:
        raise ConfigError(f"--env must be NAME=VALUE or NAME, not '{text}'")
    return (name, value) if equals else (name, environ.get(name))


def parse_lines(text: str, name: str, environ: Mapping[str, str]) -> list[Assignment]:
    """The variables of a file: NAME=VALUE in each line, all of VALUE as it stands; NAME alone where this host has it.

    Empty lines, and lines that begin with #, are skipped. name: the file's, for errors. Raises ConfigError.
    """
    found: list[Assignment] = []
    for number, line in enumerate(text.removeprefix(_BOM).split("\n"), 1):
        stripped = line.removesuffix("\r").lstrip()
        if not stripped or stripped.startswith("#"):
            continue
        key, equals, value = stripped.partition("=")
        trouble = _find_trouble(key, stripped)
        if trouble:
            raise ConfigError(
                f"{name}:{number}: {trouble}", details=line.strip()[:200], hint="a line is NAME=VALUE, NAME or #..."
            )
        if equals:
            found.append((key, value))
        elif key in environ:
            found.append((key, environ[key]))
    return found


def _find_trouble(key: str, line: str) -> str:
    if not key:
        return "a name is missing before the ="
    if _BLANK.search(key):
        return f"the name '{key}' has a blank in it"
    return "the line has a NUL byte" if "\0" in line else ""


def read_file(path: Path, environ: Mapping[str, str]) -> list[Assignment]:
    """The variables of a file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read --env-file {path}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"--env-file {path} has more than {FILE_BYTES_MAX} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: the line is no UTF-8") from error
    return parse_lines(text, str(path), environ)


def merge(image: Sequence[str], assignments: Iterable[Assignment]) -> dict[str, str]:
    """The variables of an image with those of the user over them. What is no NAME=VALUE in the image is skipped."""
    merged = {name: value for name, equals, value in (word.partition("=") for word in image) if name and equals}
    for name, value in assignments:
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged
