"""Turns a matrix file into cells. Pure. A cell is one planned machine and its commands, which run one after another.

images x kernels x backends x architectures x commands; docs/howto/matrix.md explains every key.
"""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmkit.architectures import ARCHITECTURES, HOST
from vmkit.errors import ConfigError
from vmkit.machine.options import OPTIONS
from vmkit.machine.parts.part import Option
from vmkit.machine.source import name_machine
from vmkit.roots.source import SourceKind, parse_source

BACKENDS = ("auto", "user", "vhost")
DEFAULT_COMMAND_TIMEOUT_S = 600.0
# A file of commands is a page; a matrix of more machines than this was a mistake.
MAX_FILE_BYTES = 1 << 20
MAX_CELLS = 100_000
# Of those that an error lists.
MAX_LISTED = 20
# Machine options that all cells have in common.
OPTION_KEYS = tuple(option.name for option in OPTIONS if option.is_matrix)
KEYS = ("images", "kernels", "backends", "architectures", *OPTION_KEYS, "timeout", "fresh", "ktap", "commands")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class GuestCommand:
    """One command of every cell. argv: the words themselves; `sh -c LINE` for a line for the guest's shell. has_ktap:
    it prints test results.
    """

    name: str
    argv: tuple[str, ...]
    has_ktap: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One machine and its commands. kernel: None for the image's own. is_fresh: the machine has one command alone,
    which the name names, too. The name is unique in the plan."""

    image: str
    kernel: Path | None
    backend: str
    commands: tuple[GuestCommand, ...]

    is_fresh: bool = False
    architecture: str = HOST

    @property
    def image_name(self) -> str:
        """The image or the root, without its folder."""
        return _name_image(self.image)

    @property
    def name(self) -> str:
        kernel = "own" if self.kernel is None else self.kernel.name
        words: tuple[str, ...] = (self.image_name, kernel, self.backend)
        if self.architecture != HOST:
            words = (*words, self.architecture)
        return "/".join((*words, self.commands[0].name) if self.is_fresh else words)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Every cell, and their common settings. timeout_s: for each command; options: for each machine, by name."""

    cells: tuple[Cell, ...]
    options: Mapping[str, Any]
    timeout_s: float

    @property
    def memory_mib(self) -> int:
        """The memory of each machine."""
        return int(self.options["memory"])

    @property
    def digest(self) -> str:
        """SHA-256 of all that the file says. It is the same on every node: paths are in it by their last names."""
        commands = dict.fromkeys(command for cell in self.cells for command in cell.commands)
        value = [
            [cell.name for cell in self.cells],
            [[command.name, list(command.argv), command.has_ktap] for command in commands],
            sorted((key, str(option)) for key, option in self.options.items()),
            self.timeout_s,
        ]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def read_matrix(path: Path) -> Matrix:
    """Reads the matrix of a file. Raises ConfigError naming the file and the key."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the matrix {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"the matrix {path} is larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        raw = tomllib.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan_matrix(raw, path)


def plan_matrix(raw: Mapping[str, Any], path: Path) -> Matrix:
    """Plans the matrix of a parsed file. Relative paths of recipes, roots and kernels start at the file's own
    folder.
    """
    unknown = sorted(set(raw) - set(KEYS))
    if unknown:
        raise ConfigError(f"{path}: unknown key '{unknown[0]}'", hint=f"the keys are: {', '.join(KEYS)}")
    images = [_locate(image, path) for image in _texts(raw, "images", path, ["tiny"])]
    kernels = [path.parent / kernel if kernel else None for kernel in _texts(raw, "kernels", path, [""])]
    backends = _texts(raw, "backends", path, ["auto"])
    for backend in backends:
        if backend not in BACKENDS:
            raise ConfigError(f"{path}: backends: must be one of {', '.join(BACKENDS)}, not '{backend}'")
    architectures = _texts(raw, "architectures", path, [HOST])
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(f"{path}: architectures: must be one of {known}, not '{architecture}'")
    commands = _mark_ktap(_commands(raw.get("commands"), path), raw, path)
    is_fresh = _value(raw, "fresh", bool, False, path)
    groups = [(command,) for command in commands] if is_fresh else [tuple(commands)]
    count = len(images) * len(kernels) * len(backends) * len(architectures) * len(groups)
    if count > MAX_CELLS:
        raise ConfigError(f"{path}: {count} machines are more than {MAX_CELLS}")
    cells = tuple(
        Cell(image, kernel, backend, group, is_fresh, architecture)
        for image in images
        for kernel in kernels
        for backend in backends
        for architecture in architectures
        for group in groups
    )
    twice = sorted(name for name, count in Counter(cell.name for cell in cells).items() if count > 1)
    if twice:
        hint = "give recipes, roots and kernels different names"
        raise ConfigError(f"{path}: two cells are called {twice[0]}", hint=hint)
    return Matrix(
        cells,
        {option.name: _option(raw, option, path) for option in OPTIONS if option.is_matrix},
        float(_value(raw, "timeout", (int, float), DEFAULT_COMMAND_TIMEOUT_S, path)),
    )


def pick_cells(matrix: Matrix, names: Sequence[str]) -> tuple[Cell, ...]:
    """Returns the named cells, or all without names. Raises ConfigError for an unknown name."""
    known = {cell.name: cell for cell in matrix.cells}
    for name in names:
        if name not in known:
            some = ", ".join(list(known)[:MAX_LISTED]) + (", and more" if len(known) > MAX_LISTED else "")
            raise ConfigError(f"the matrix has no cell '{name}'", hint=f"it has: {some}")
    return tuple(known[name] for name in names) if names else matrix.cells


def _locate(image: str, path: Path) -> str:
    """The image in words that mean the same in every directory."""
    try:
        source = parse_source(image)
    except ConfigError as error:
        raise ConfigError(f"{path}: images: {error.brief}", hint=error.hint) from error
    if source.kind is SourceKind.STREAM:
        raise ConfigError(f"{path}: images: a matrix reads no root from standard input", hint="save it into a file")
    if source.kind is SourceKind.IMAGE:
        return str(path.parent / image) if image.endswith(".toml") else image
    if source.path is None:
        return image
    place = str((path.parent / source.path.expanduser()).absolute())
    if source.kind is SourceKind.PATH:
        return place
    if ":" in place:
        raise ConfigError(f"{path}: images: the path of {image} has a colon: {place}", hint="move it, or link to it")
    scheme = image.partition(":")[0]
    return ":".join(filter(None, (scheme, place, source.reference)))


def _name_image(image: str) -> str:
    """What a cell is called after its image. The tag of a container image counts."""
    source = parse_source(image)
    if source.kind is SourceKind.IMAGE:
        return Path(image).stem
    if source.path is None:
        return _NO_NAME.sub("-", source.reference.rpartition("/")[2])
    name = name_machine(source.path)
    return f"{name}-{_NO_NAME.sub('-', source.reference)}" if source.reference else name


def _texts(raw: Mapping[str, Any], key: str, path: Path, default: list[str]) -> list[str]:
    value = raw.get(key, default)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ConfigError(f"{path}: {key}: must be a list with at least one string")
    return value


def _value(raw: Mapping[str, Any], key: str, kind: Any, default: Any, path: Path) -> Any:
    value = raw.get(key, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{path}: {key}: must be a value such as {_render(default)}, not {_render(value)}")
    if not isinstance(value, str | bool) and value <= 0:
        raise ConfigError(f"{path}: {key}: must be more than 0")
    return value


def _render(value: object) -> str:
    """As TOML writes it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _option(raw: Mapping[str, Any], option: Option, path: Path) -> Any:
    """Returns a machine option as vmkit.Machine takes it. An option of text may be a number, too: memory = 512."""
    if option.reads_text:
        return option.read(str(raw.get(option.name, option.default)))
    return option.read(_value(raw, option.name, type(option.default), option.default, path))


def _commands(value: object, path: Path) -> list[GuestCommand]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{path}: [commands] is missing", hint='such as: [commands] and below it: uname = "uname -a"')
    commands = []
    for name, given in value.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: commands: '{name}' cannot be a name", hint="use letters, digits, '.', '_', '-'")
        if isinstance(given, str) and given:
            commands.append(GuestCommand(name, ("sh", "-c", given)))
        elif isinstance(given, list) and given and all(isinstance(word, str) for word in given):
            commands.append(GuestCommand(name, tuple(given)))
        else:
            raise ConfigError(f"{path}: commands.{name}: must be a line for the shell, or a list of words")
    return commands


def _mark_ktap(commands: list[GuestCommand], raw: Mapping[str, Any], path: Path) -> list[GuestCommand]:
    if "ktap" not in raw:
        return commands
    wanted = _texts(raw, "ktap", path, [])
    known = [command.name for command in commands]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"{path}: ktap: there is no command '{name}'", hint=f"there are: {', '.join(known)}")
    return [replace(command, has_ktap=command.name in wanted) for command in commands]
