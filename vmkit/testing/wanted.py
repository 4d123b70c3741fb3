"""Which machine a test wants: the words of its marker, as a value. Pure.

`@pytest.mark.vm(image="tiny", memory="128M")`. A list of images or kernels stands for one test each.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

# What a marker can have beside the options of vmkit.Machine that a pool has too.
FILES = "files"
OPTIONS = (
    *("image", "kernel", "memory", "cpus", "backend", "accelerator", "append", "cpu", "disks", "snapshot", "boot"),
    *("timeout_s", "token"),
)
# These make one test of each of their values.
LISTS = ("image", "kernel")
DISKS = "disks"


class MarkerError(Exception):
    """A marker that cannot be a machine; the text is for the test's author."""


@dataclass(frozen=True)
class Wanted:
    """One kind of machine. files: by their path in the guest, the file of the host or its bytes."""

    options: Mapping[str, Any]
    files: Mapping[str, str | bytes | Path] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Six digits by which equal kinds are known. Files are pushed into each machine, and do not count."""
        text = json.dumps({name: str(value) for name, value in self.options.items()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:6]

    def __str__(self) -> str:
        names = [str(self.options[name]) for name in LISTS if self.options.get(name) is not None]
        parts = [Path(name).stem.removesuffix(".tar") for name in names]
        return "-".join(parts) or "vm"


def read_marker(arguments: tuple[object, ...], words: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Wanted]:
    """The kinds that a marker asks for, at least one. defaults: of the whole run. Raises MarkerError."""
    if arguments:
        raise MarkerError("the marker vm takes keywords only, as in vm(image='tiny')")
    unknown = words.keys() - {*OPTIONS, FILES}
    if unknown:
        raise MarkerError(f"the marker vm has no '{min(unknown)}'; it has {', '.join((*OPTIONS, FILES))}")
    files = words.get(FILES, {})
    if not isinstance(files, Mapping):
        raise MarkerError("files of the marker vm must be a dictionary: the path in the guest, and what it gets")
    for path, content in files.items():
        if not isinstance(path, str) or not isinstance(content, str | bytes | Path):
            raise MarkerError(
                f"files of the marker vm map a path to bytes or to a file's path, not {path!r} to {content!r}"
            )
    for name in OPTIONS:
        value = words.get(name)
        if isinstance(value, list | tuple) and name not in (*LISTS, DISKS):
            raise MarkerError(
                f"'{name}' of the marker vm takes one value; for a test of each, parametrize with "
                f"pytest.param(..., marks=pytest.mark.vm({name}=...))"
            )
    if words.get("snapshot"):
        # It brings its own image and memory. What the run has for all tests is no wish for other ones.
        defaults = {}
    chosen = {**defaults, **{name: value for name, value in words.items() if name != FILES}}
    return [Wanted(options, files) for options in _spread(chosen)]


def _spread(words: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [name for name in LISTS if isinstance(words.get(name), list | tuple)]
    for name in lists:
        if not words[name]:
            raise MarkerError(f"the list of '{name}' in the marker vm is empty")
    for values in product(*(words[name] for name in lists)):
        yield {**words, **dict(zip(lists, values, strict=True))}
