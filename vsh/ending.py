"""Why a machine of the registry has ended: read from what its monitor leaves, or heard from the monitor itself.

The contract is docs/explanation/architecture.md, "Contracts between rooms": the monitor writes `ends/NAME.json` below
the runtime directory, then tells everyone on its socket, then removes the machine's directory.
"""

import json
import os
import socket
import time

from vsh import registry
from vsh.errors import ConnectionLost, VshError
from vsh.registry import Entry

ENDS = "ends"
CONTROL = "monitor.sock"
# The console's last lines are in it.
MAX_RECORD_BYTES = 256 * 1024
MAX_LINE_BYTES = 64 * 1024
# A kernel that panics resets, QEMU ends, and the monitor collects the logs: a second on a busy host.
GRACE_S = 3.0


class Ending:
    """The end of one machine. details: the console's last lines, where nobody asked for the end."""

    __slots__ = ("at_s", "brief", "details", "hint", "is_expected", "pid")

    def __init__(self, record: dict[str, object]) -> None:
        self.brief = str(record["brief"])
        self.is_expected = bool(record["expected"])
        self.details = str(record.get("details", ""))
        self.hint = str(record.get("hint", ""))
        self.pid = int(str(record.get("pid", 0)))
        self.at_s = float(str(record.get("at", 0)))


def read_ending(name: str, pid: int = 0) -> Ending | None:
    """How the last machine of that name ended; with pid, how the machine of that monitor did. None: not known."""
    path = os.path.join(registry.find_runtime_directory(), ENDS, f"{name}.json")
    try:
        with open(path, "rb") as file:
            ending = Ending(json.loads(file.read(MAX_RECORD_BYTES)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None if pid and ending.pid != pid else ending


def describe_last(name: str) -> str:
    """One line about the last machine of that name that ended; empty when none did lately."""
    # What was asked for by a name that no machine can have is no file of ours.
    ending = None if "/" in name else read_ending(name)
    if ending is None:
        return ""
    minutes, seconds = divmod(max(0, int(time.time() - ending.at_s)), 60)
    age = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds} s"
    return f"the last machine of that name ended {age} ago: {ending.brief}"


def await_ending(entry: Entry, grace_s: float = GRACE_S) -> Ending | None:
    """How this machine ended, or ends within a moment; None when it goes on."""
    ending = read_ending(entry.name, entry.pid)
    if ending is not None or not entry.pid:
        return ending
    heard = _hear_end(entry, grace_s) if _is_there(entry) else None
    ending = read_ending(entry.name, entry.pid) or heard
    if ending is None and not _is_there(entry):
        return Ending({"brief": "its monitor was killed", "expected": False, "pid": entry.pid})
    return ending


def explain_loss(error: VshError, entry: Entry | None) -> None:
    """Makes the machine's end the cause that an error names, where that end is why there is no session any more."""
    ending = await_ending(entry) if entry is not None else None
    if entry is None or ending is None:
        return
    is_lost = isinstance(error, ConnectionLost)
    what = f"lost the connection to machine '{entry.name}'" if is_lost else f"machine '{entry.name}' has ended"
    error.brief = f"{what}: {ending.brief}"
    error.args = (error.brief,)
    error.details = ending.details
    error.hint = ending.hint or ("" if ending.is_expected else f"see its logs: vmkit logs {entry.name}")


def _is_there(entry: Entry) -> bool:
    """True while this very machine is registered, and not a later one of its name."""
    now = registry.find_machine(name=entry.name)
    return now is not None and now.pid == entry.pid


def _hear_end(entry: Entry, grace_s: float) -> Ending | None:
    """What the monitor tells when the machine ends; None when it tells nothing within grace_s seconds."""
    deadline_s = time.monotonic() + grace_s
    text = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        try:
            control.settimeout(grace_s)
            control.connect(os.path.join(entry.directory, CONTROL))
            while len(text) < MAX_LINE_BYTES:
                control.settimeout(max(0.001, deadline_s - time.monotonic()))
                data = control.recv(MAX_LINE_BYTES)
                if not data:
                    break
                text += data
        except OSError:
            # Nothing listens any more, or the machine goes on.
            pass
    for line in text.splitlines():
        try:
            return Ending({**json.loads(line), "pid": entry.pid})
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
