"""The registry of lasting forwards: one entry each (vmkit.entries), with the lowest free number as its name.

The process that keeps the forward holds the lock of its entry for life.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmkit.entries.entry import read_entries
from vmkit.entries.numbered import Numbered, make_numbered
from vsh.registry import find_runtime_directory

FORWARDS = "forwards"
RECORD = "forward.json"
LOG = "log"


@dataclass(frozen=True, slots=True)
class Kept:
    """A lasting forward: `machine` is its machine's name; `forwards` are the requested ones, as `-L listen:target`;
    `listening` are their addresses, in the same order.
    """

    number: int
    machine: str
    forwards: tuple[str, ...]
    listening: tuple[str, ...]
    pid: int
    started: float


@contextlib.contextmanager
def keep(machine: str, forwards: tuple[str, ...]) -> Iterator["OwnForward"]:
    """Makes an entry of this process. Others do not see it before publish(). The end of the block removes it."""
    with make_numbered(FORWARDS) as entry:
        yield OwnForward(entry, machine, forwards)


class OwnForward:
    """Our own entry."""

    def __init__(self, entry: Numbered, machine: str, forwards: tuple[str, ...]) -> None:
        self._entry = entry
        self._machine = machine
        self._forwards = forwards

    @property
    def directory(self) -> Path:
        """Its present path."""
        return self._entry.directory

    def publish(self, listening: tuple[str, ...]) -> Kept:
        """Gives the forward the lowest free number, and shows it to others. Raises HostError."""
        with self._entry.choose_number() as number:
            kept = Kept(number, self._machine, self._forwards, listening, os.getpid(), time.time())
            self._entry.publish(number, RECORD, asdict(kept))
        return kept


def read_kept() -> list[Kept]:
    """Returns every lasting forward, by number."""
    folder = Path(find_runtime_directory()) / FORWARDS
    return sorted(read_entries(folder, RECORD, _parse), key=lambda kept: kept.number)


def read_log(number: int) -> str:
    """Returns the last lines of a forward's log, which has the errors of its connections."""
    try:
        return (Path(find_runtime_directory()) / FORWARDS / str(number) / LOG).read_text(errors="replace")
    except OSError:
        return ""


def _parse(record: Any, _directory: Path) -> tuple[str, Kept]:
    kept = Kept(
        number=int(record["number"]),
        machine=str(record["machine"]),
        forwards=tuple(map(str, record["forwards"])),
        listening=tuple(map(str, record["listening"])),
        pid=int(record["pid"]),
        started=float(record["started"]),
    )
    return str(kept.number), kept
