"""Templates: the files that are offered, and the process in which they become text.

A recipe may come from a stranger, and a template is a program. So it is rendered by vmkit.image.recipe.sandbox, in a
process without files and with limits, from texts that were read here. What was read is also what a build's digest
covers.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError, CommandError, ConfigError
from vmkit.image.recipe.hostfile import HostFileError, read_host_file
from vmkit.run import run

# A folder named by mistake (a home directory) must not be read to its end.
FILE_COUNT_LIMIT = 1000
FOLDER_COUNT_LIMIT = 1000
FOLDER_LIMIT_BYTES = 64 << 20
# A template is a page of text. Other files of the folder may be anything.
TEMPLATE_LIMIT_BYTES = 1 << 20

# Rendering all templates of an image takes a fifth of a second.
RENDER_CPU_S = 10
RENDER_MEMORY_BYTES = 1 << 30
_RENDER_TIMEOUT_S = 120.0
_SANDBOX = Path(__file__).with_name("sandbox.py")


@dataclass(frozen=True, slots=True)
class Template:
    """One file of a template folder. trouble: why it cannot be a template; its text is empty then."""

    path: Path
    text: str
    trouble: str = ""


def read_templates(folders: Sequence[Path], recipes: Sequence[Path]) -> dict[str, Template]:
    """The templates of some folders by name; a name is taken from the first folder that has it.

    A file that is one of the recipes is no template, nor is one that a symlink leads to outside its folder. Raises
    ConfigError for a folder that is missing, or much too large.
    """
    barred = {_identify(path) for path in recipes}
    templates: dict[str, Template] = {}
    for folder in folders:
        size_bytes = 0
        for name in _list_files(folder):
            path = folder / name
            template = _read_template(path, folder, barred)
            templates.setdefault(name, template)
            size_bytes += len(template.text)
            if size_bytes > FOLDER_LIMIT_BYTES:
                raise ConfigError(f"the template folder {folder} holds more than {FOLDER_LIMIT_BYTES >> 20} MiB")
    return templates


def render_templates(
    templates: Mapping[str, Template], names: Sequence[str], variables: Mapping[str, object]
) -> dict[str, str]:
    """The texts of the named templates. variables: texts, numbers, true/false, and lists and tables of these.

    Raises ConfigError with file and line for whatever is wrong with one.
    """
    job = {
        "templates": {
            name: [str(template.path), template.text, template.trouble] for name, template in templates.items()
        },
        "names": list(names),
        "variables": variables,
        "cpu_s": RENDER_CPU_S,
        "memory_bytes": RENDER_MEMORY_BYTES,
        # Where Jinja2 is. The process looks nowhere else, and not into the working directory.
        "path": [str(Path(entry).absolute()) for entry in sys.path if entry],
    }
    try:
        answer = json.loads(
            run([sys.executable, "-I", "-B", _SANDBOX], timeout_s=_RENDER_TIMEOUT_S, stdin=json.dumps(job).encode())
        )
    except CommandError as error:
        raise ConfigError(
            f"the templates take more than {RENDER_CPU_S} s or {RENDER_MEMORY_BYTES >> 20} MiB to render",
            details=f"templates: {', '.join(names)}\n{error.brief}",
            hint="a template without an end, or one that makes a very long text",
        ) from error
    except ValueError as error:
        raise BuildError(f"the process that renders templates gave no answer: {error}") from error
    if "brief" in answer:
        raise ConfigError(answer["brief"], details=answer["details"], hint=answer["hint"])
    return {name: str(answer["texts"][name]) for name in names}


def _list_files(folder: Path) -> Iterator[str]:
    """The names of all files below a folder, sorted; a symlink to a folder is not followed."""
    if not folder.is_dir():
        raise ConfigError(f"the template folder {folder} does not exist")
    found: list[str] = []
    for count, (where, _, files) in enumerate(os.walk(folder)):
        found += [str((Path(where) / name).relative_to(folder)) for name in files]
        if len(found) > FILE_COUNT_LIMIT or count > FOLDER_COUNT_LIMIT:
            raise ConfigError(
                f"the template folder {folder} holds more than {FILE_COUNT_LIMIT} files or {FOLDER_COUNT_LIMIT} folders"
            )
    yield from sorted(found)


def _read_template(path: Path, folder: Path, barred: set[tuple[int, int]]) -> Template:
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        return Template(path, "", "it is a symlink that leaves the template folder")
    if _identify(path) in barred:
        return Template(path, "", "it is the recipe itself")
    try:
        return Template(path, read_host_file(path, TEMPLATE_LIMIT_BYTES).decode())
    except HostFileError as error:
        return Template(path, "", str(error))
    except UnicodeDecodeError:
        return Template(path, "", "it is not UTF-8 text")


def _identify(path: Path) -> tuple[int, int]:
    """The file behind a path, whatever its name."""
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return (status.st_dev, status.st_ino)
