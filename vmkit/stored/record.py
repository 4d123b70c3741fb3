"""What is known of a stored machine: the record in its folder, and its JSON. Pure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
# Options are words and paths of the command line.
MAX_RECORD_BYTES = 1 << 20
FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class Base:
    """The file below a machine's disk. path: from the machine's folder, or from the root for a file of the user's.

    disk_format: `raw` or `qcow2`. size_bytes and mtime_ns tell whether it has changed since the machine was made.
    """

    path: str
    disk_format: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A stored machine.

    source: what its root was made of, in its user's words. made: in seconds since 1970. root: what the guest is told of
    its disk: `ext4`, or `ext4:2` for the second partition. disk_bytes: the size of the disk that the guest sees.
    options: those of `vmkit up` that it starts with, by their names. container: what a container image says of
    sessions, by the names of its settings; empty where it says nothing.
    """

    name: str
    source: str
    made: float
    root: str
    disk_bytes: int
    base: Base
    options: Mapping[str, Any] = field(default_factory=dict)
    container: Mapping[str, Any] = field(default_factory=dict)


def render_record(record: StoredRecord) -> bytes:
    """As JSON."""
    return json.dumps({"schema": SCHEMA, **asdict(record)}, indent=2).encode() + b"\n"


def parse_record(data: bytes) -> StoredRecord:
    """A record from its JSON. Raises ValueError for what render_record() did not make."""
    try:
        value = json.loads(data)
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is {value['schema']}, and this vmkit knows {SCHEMA}")
        base = Base(**{name: _take(value["base"], name, kind) for name, kind in _BASE.items()})
        record = StoredRecord(**{name: _take(value, name, kind) for name, kind in _RECORD.items()}, base=base)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("it is no record of a machine") from error
    if base.disk_format not in FORMATS or record.disk_bytes <= 0 or record.disk_bytes % 512:
        raise ValueError("its disk_bytes or its base's format is wrong")
    return record


_BASE: dict[str, type | tuple[type, ...]] = {"path": str, "disk_format": str, "size_bytes": int, "mtime_ns": int}
_RECORD: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "source": str,
    "made": (int, float),
    "root": str,
    "disk_bytes": int,
    "options": dict,
    "container": dict,
}


def _take(value: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    found = value[name]
    # True is an int of Python's.
    if isinstance(found, bool) or not isinstance(found, kind):
        raise TypeError(name)
    return found
