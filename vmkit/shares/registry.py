"""The registry of shares: one entry each (vmkit.entries.numbered), kept by the process that serves the share."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmkit.entries.entry import read_entries
from vmkit.entries.numbered import Numbered
from vmkit.errors import MachineError
from vmkit.shares.place import SharedPlace, parse_place
from vsh.registry import find_runtime_directory

SHARES = "shares"
RECORD = "share.json"


@dataclass(frozen=True, slots=True)
class LiveShare:
    """A folder of this host that a guest has. transport: a name of vmkit.shares.transports."""

    number: int
    machine: str
    host: str
    guest: str
    read_only: bool
    transport: str
    pid: int
    started: float


def publish(entry: Numbered, machine: str, place: SharedPlace, transport: str) -> LiveShare:
    """Shows our own share to others. Raises HostError."""
    with entry.choose_number() as number:
        facts = (machine, str(place.host), place.guest, place.read_only, transport, os.getpid(), time.time())
        share = LiveShare(number, *facts)
        entry.publish(number, RECORD, asdict(share))
    return share


def read_shares(machine: str | None = None) -> list[LiveShare]:
    """Returns the shares of a machine, or all, by number."""
    folder = Path(find_runtime_directory()) / SHARES
    shares = read_entries(folder, RECORD, _parse)
    return sorted((one for one in shares if machine in (None, one.machine)), key=lambda one: one.number)


def find_share(shares: Sequence[LiveShare], machine: str, text: str) -> LiveShare:
    """The share that a user means by HOST, HOST:GUEST or GUEST. Raises MachineError for none, and for several."""
    found = [one for one in shares if one.guest == text]
    if not found:
        host, _, guest = text.partition(":")
        place = parse_place(f"{host}:{guest or '/any'}")
        found = [one for one in shares if one.host == str(place.host) and guest in ("", one.guest)]
    if len(found) == 1:
        return found[0]
    if found:
        raise MachineError(f"{machine} has {text} {len(found)} times", hint=f"name one: {found[0].guest}")
    known = ", ".join(one.guest for one in shares)
    hint = f"its shares: {known}" if known else "it has no shares"
    raise MachineError(f"{machine} has no share {text}", hint=hint)


def parse_share(record: Any) -> LiveShare:
    """Raises ValueError, KeyError, TypeError."""
    return LiveShare(
        number=int(record["number"]),
        machine=str(record["machine"]),
        host=str(record["host"]),
        guest=str(record["guest"]),
        read_only=bool(record["read_only"]),
        transport=str(record["transport"]),
        pid=int(record["pid"]),
        started=float(record["started"]),
    )


def _parse(record: Any, _directory: Path) -> tuple[str, LiveShare]:
    share = parse_share(record)
    return str(share.number), share
