"""The words of `vmkit cp`: which are paths of this host and which are of machines. Pure."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vmkit.errors import ConfigError

STREAM = "-"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One side of a copy. machine: a name or CID; "" for the only machine; None for this host.

    is_stream: standard input or output.
    """

    machine: str | None
    path: bytes
    is_stream: bool = False


def parse_endpoint(word: str) -> Endpoint:
    """Reads `NAME:PATH`, `CID:PATH`, `:PATH`, `-` or a path of this host. Raises ConfigError.

    A path of this host that has a colon before its first slash is written `./a:b`.
    """
    if not word:
        raise ConfigError("a path must not be empty")
    if "\0" in word:
        raise ConfigError("a path must not contain a NUL")
    if word == STREAM:
        return Endpoint(None, b"", is_stream=True)
    machine, mark, path = word.partition(":")
    if not mark or "/" in machine:
        return Endpoint(None, os.fsencode(word))
    # The server's current directory is the user's home.
    if path == "~" or path.startswith("~/"):
        path = path[2:]
    return Endpoint(machine, os.fsencode(path) or b".")


def plan_copy(words: Sequence[str]) -> tuple[list[Endpoint], Endpoint]:
    """Returns the sources and the destination. Raises ConfigError for a pair that is no copy in or out of a machine."""
    *sources, destination = map(parse_endpoint, words)
    if not sources:
        raise ConfigError("vmkit cp needs a source and a destination", hint="vmkit cp FILE NAME:PATH")
    if destination.machine is None and any(source.machine is None for source in sources):
        both = next(word for word, source in zip(words, sources, strict=False) if source.machine is None)
        raise ConfigError(
            f"neither {both} nor {words[-1]} is on a machine", hint="write NAME:PATH for a path on a machine"
        )
    if len(sources) > 1 and (destination.is_stream or any(source.is_stream for source in sources)):
        raise ConfigError("`-` goes with one source and one destination")
    return sources, destination


def plan_sync(words: Sequence[str]) -> tuple[Endpoint, Endpoint]:
    """Returns the two directories of a sync. Raises ConfigError where neither is on a machine."""
    if STREAM in words:
        raise ConfigError("`-` is no directory, and vmkit sync needs two")
    (source,), destination = plan_copy(words)
    return source, destination


def split_source(path: bytes) -> tuple[bytes, bytes]:
    """Returns the directory and the name of a source; the name `.` stands for the directory itself."""
    folder, name = os.path.split(path.rstrip(b"/") or b"/")
    if name in (b"", b".", b".."):
        return path, b"."
    return folder or b".", name


def split_destination(path: bytes) -> tuple[bytes, bytes]:
    """Returns the directory and the name of a destination that is no directory. Raises ConfigError without a name."""
    folder, name = os.path.split(path)
    if name in (b"", b".", b".."):
        raise ConfigError(f"{os.fsdecode(path)} is not an existing directory")
    return folder or b".", name
