"""Names of files on a machine, for a shell that completes a path: few, soon, and none where anything goes wrong."""

import os
import time

from vmkit.copy.calls import start_channel
from vmkit.copy.engine import Engine, Step
from vmkit.copy.guest_source import GuestFolder
from vmkit.copy.items import ItemKind
from vmkit.machine.running import pick_entry
from vsh.address import address_of
from vsh.errors import VshError
from vsh.subsystem import open_subsystem

# A person waits for it.
DEADLINE_S = 1.5
NAMES_MAX = 2000
# A shell puts a name into a command line as it is, and the guest chooses its names.
SAFE = frozenset("._-+@%=,")


def list_paths(machine: str, path: str) -> list[str]:
    """Returns the paths of a machine that begin with `path`; those of directories end in `/`."""
    folder, slash, start = path.rpartition("/")
    ends_s = time.monotonic() + DEADLINE_S
    found: list[str] = []

    def read() -> Step[None]:
        yield from start_channel(channel)
        listing = yield from GuestFolder(channel, os.fsencode(folder + slash) or b".").open_folder(b".")
        while (batch := (yield from listing.read_batch())) and time.monotonic() < ends_s:
            for name, item in batch:
                text = os.fsdecode(name)
                is_hidden = text.startswith(".") and not start.startswith(".")
                if text.startswith(start) and not is_hidden and is_safe(text) and len(found) < NAMES_MAX:
                    found.append(folder + slash + text + ("/" if item.kind == ItemKind.FOLDER else ""))

    try:
        entry = pick_entry(machine or None)
        with open_subsystem(address_of(entry), "sftp", timeout_s=DEADLINE_S) as sock:
            engine = Engine()
            channel = engine.open_channel(sock, entry.name)
            engine.push([(0, read)])
            engine.run(DEADLINE_S)
    except (VshError, OSError):
        return []
    return sorted(found)


def is_safe(name: str) -> bool:
    """Whether a shell gives a name no meaning of its own."""
    return all(letter.isalnum() or letter in SAFE for letter in name)
