"""What a container image says of the program in it: environment, directory, user, entry point and command.

Pure: from the configuration's JSON (OCI image specification, config.md). Every value is checked, for the image's
maker wrote it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmkit.errors import BuildError

_LIST_LIMIT = 10_000
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ContainerSettings:
    """How the image wants its program run. Empty where it says nothing, as for a plain archive, folder or disk."""

    env: tuple[str, ...] = ()
    working_dir: str = ""
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing."""
        return self == ContainerSettings()


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """An image's configuration. diff_ids: the digest of each layer when it is unpacked, the lowest first."""

    architecture: str
    system: str
    diff_ids: tuple[str, ...]
    settings: ContainerSettings


def parse_json(data: bytes, name: str) -> object:
    """The value in a document. Raises BuildError for what is no JSON, or too deep for a reader."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{name} is damaged: it is not JSON ({error})") from error


def parse_config(data: bytes, name: str) -> ImageConfig:
    """Reads a configuration. name: the document's, for errors. Raises BuildError."""
    document = take_mapping(parse_json(data, name), name)
    rootfs = take_mapping(document.get("rootfs"), f"rootfs of {name}")
    config = take_mapping(document.get("config") or {}, f"config of {name}")
    return ImageConfig(
        architecture=take_text(document.get("architecture", ""), f"architecture of {name}"),
        system=take_text(document.get("os", ""), f"os of {name}"),
        diff_ids=take_texts(rootfs.get("diff_ids"), f"diff_ids of {name}"),
        settings=ContainerSettings(
            env=take_texts(config.get("Env"), f"Env of {name}"),
            working_dir=take_text(config.get("WorkingDir") or "", f"WorkingDir of {name}"),
            user=take_text(config.get("User") or "", f"User of {name}"),
            entrypoint=take_texts(config.get("Entrypoint"), f"Entrypoint of {name}"),
            cmd=take_texts(config.get("Cmd"), f"Cmd of {name}"),
        ),
    )


def take_mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise BuildError(f"the {name} is damaged: it is no JSON object")
    return value


def take_list(value: object, name: str) -> Sequence[object]:
    """A list; nothing and null are an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _LIST_LIMIT:
        raise BuildError(f"the {name} is damaged: it is no list, or has more than {_LIST_LIMIT} entries")
    return value


def take_text(value: object, name: str) -> str:
    # JSON can hold half of a character, which no file system and no process takes.
    if not isinstance(value, str) or "\0" in value or _HALVES.search(value):
        raise BuildError(f"the {name} is damaged: it is no text")
    return value


def take_texts(value: object, name: str) -> tuple[str, ...]:
    return tuple(take_text(entry, name) for entry in take_list(value, name))
