"""Boots of machines that have no snapshot: how many with each key, and why a builder made none in the background.

One small file for all keys, in the folder of the snapshots. The file is of no worth: a broken one is an empty one.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vmkit.snapshots.store import open_new

BOOTS = "boots.json"
SCHEMA = 1
# At this boot with the same key, and at those after it, a snapshot is worth its making.
DUE_BOOTS = 2
# A kernel developer has a new key with each build.
MAX_KEYS = 64
IDLE_S = 14 * 24 * 3600
# A reason may be passing, as a host that was too busy.
RETRY_S = 24 * 3600
MAX_ERROR_CHARACTERS = 500
MAX_FILE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Boots:
    """The boots with one key. last: the time of the last. error: why no snapshot was made, at the time `failed`."""

    image: str
    memory_mib: int
    boots: int
    last: float
    error: str = ""
    failed: float = 0.0

    def is_due(self, now: float) -> bool:
        """Whether a snapshot is to be made."""
        return self.boots >= DUE_BOOTS and not (self.error and 0 <= now - self.failed < RETRY_S)


def count_boot(known: Mapping[str, Boots], key: str, image: str, memory_mib: int, now: float) -> dict[str, Boots]:
    """All of them, with one boot more. Drops those that are old or too many."""
    before = known.get(key, Boots(image, memory_mib, 0, now))
    counted = {**known, key: replace(before, boots=before.boots + 1, last=now)}
    newest = sorted(counted.items(), key=lambda item: item[1].last, reverse=True)[:MAX_KEYS]
    return {name: boots for name, boots in newest if now - boots.last <= IDLE_S}


def note_failure(known: Mapping[str, Boots], key: str, error: str, now: float) -> dict[str, Boots]:
    """All of them, with the reason why no snapshot of this key was made."""
    if key not in known:
        return dict(known)
    return {**known, key: replace(known[key], error=error[:MAX_ERROR_CHARACTERS], failed=now)}


def read_boots(folder: Path) -> dict[str, Boots]:
    """What the file in a folder of snapshots has; empty where there is none."""
    try:
        with (folder / BOOTS).open("rb") as file:
            value = json.loads(file.read(MAX_FILE_BYTES))
        if value["schema"] != SCHEMA:
            return {}
        return {str(key): _parse(one) for key, one in value["keys"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_boots(folder: Path, known: Mapping[str, Boots]) -> None:
    """Writes the file, so that a reader sees the old or the new one. Raises OSError."""
    new = folder / f".{BOOTS}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with open_new(new) as file:
            value = {"schema": SCHEMA, "keys": {key: asdict(boots) for key, boots in known.items()}}
            file.write(json.dumps(value).encode())
        new.rename(folder / BOOTS)
    finally:
        new.unlink(missing_ok=True)


def _parse(value: Mapping[str, object]) -> Boots:
    return Boots(
        image=str(value["image"]),
        memory_mib=int(str(value["memory_mib"])),
        boots=int(str(value["boots"])),
        last=float(str(value["last"])),
        error=str(value["error"]),
        failed=float(str(value["failed"])),
    )
