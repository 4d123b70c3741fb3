"""Finds why a machine of the registry has ended: from the record that its monitor leaves, or from the monitor itself.

The contract is docs/explanation/architecture.md, "Contracts between rooms". The monitor writes `ends/NAME.json` below
the runtime directory, then sends the end to every client of its socket, then removes the machine's directory.
"""

import json
import os
import socket
import time

from vsh import registry
from vsh.errors import ConnectionLost, HungUp, VshError
from vsh.registry import Entry

ENDS = "ends"
CONTROL = "monitor.sock"
# The console's last lines are in it.
MAX_RECORD_BYTES = 256 * 1024
MAX_LINE_BYTES = 64 * 1024
# Ends that the guest's kernel has brought about.
KERNEL_ENDS = frozenset(("panic", "reset"))
# A kernel that panics resets, QEMU ends, and the monitor collects the logs: a second on a busy host.
GRACE_S = 3.0


class Ending:
    """The end of one machine. reason: in a word, such as panic. details: the console's last lines, when the end was not
    asked for.
    """

    __slots__ = ("at_s", "brief", "details", "hint", "is_expected", "pid", "reason")

    def __init__(self, record: dict[str, object]) -> None:
        self.brief = str(record["brief"])
        self.reason = str(record.get("end", ""))
        self.is_expected = bool(record["expected"])
        self.details = str(record.get("details", ""))
        self.hint = str(record.get("hint", ""))
        self.pid = int(str(record.get("pid", 0)))
        self.at_s = float(str(record.get("at", 0)))


def read_ending(name: str, pid: int = 0) -> Ending | None:
    """Returns how the last machine of that name ended; with pid, the machine of that monitor. None: unknown."""
    path = os.path.join(registry.find_runtime_directory(), ENDS, f"{name}.json")
    try:
        with open(path, "rb") as file:
            ending = Ending(json.loads(file.read(MAX_RECORD_BYTES)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return None if pid and ending.pid != pid else ending


def describe_last(name: str) -> str:
    """Returns a line about the last machine of that name that ended; empty when none ended lately."""
    # A name that no machine can have names no file of ours.
    ending = None if "/" in name else read_ending(name)
    if ending is None:
        return ""
    minutes, seconds = divmod(max(0, int(time.time() - ending.at_s)), 60)
    age = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else f"{seconds} s"
    return f"the last machine of that name ended {age} ago: {ending.brief}"


def await_ending(entry: Entry, grace_s: float = GRACE_S) -> Ending | None:
    """Returns how this machine ended, or ends within grace_s seconds; None when it goes on."""
    ending = read_ending(entry.name, entry.pid)
    if ending is not None or not entry.pid:
        return ending
    heard = _hear_end(entry, grace_s) if _is_there(entry) else None
    ending = read_ending(entry.name, entry.pid) or heard
    if ending is None and not _is_there(entry):
        return Ending({"brief": "its monitor was killed", "expected": False, "pid": entry.pid})
    return ending


def explain_loss(error: VshError, entry: Entry | None) -> None:
    """Changes an error to name the machine's end as its cause, when the session was lost by that end."""
    ending = await_ending(entry) if entry is not None else None
    if entry is None:
        return
    if ending is None and not has_rebooted(entry):
        return
    is_lost = isinstance(error, (ConnectionLost, HungUp))
    if is_lost:
        # A command can end its machine sooner than vshd answers that it has started it.
        error.status = ConnectionLost.status
    if ending is None:
        _explain_reboot(error, entry, is_lost=is_lost)
        return
    what = f"lost the connection to machine '{entry.name}'" if is_lost else f"machine '{entry.name}' has ended"
    error.brief = f"{what}: {ending.brief}"
    error.args = (error.brief,)
    error.details = ending.details
    error.hint = ending.hint or ("" if ending.is_expected else f"see its logs: vmkit logs {entry.name}")


def has_rebooted(entry: Entry) -> bool:
    """Whether the guest of this very machine has rebooted since its record was read."""
    now = registry.find_machine(name=entry.name)
    return now is not None and now.pid == entry.pid and _count_reboots(now) > _count_reboots(entry)


def _count_reboots(entry: Entry) -> int:
    count = entry.record.get("reboots")
    return count if isinstance(count, int) else 0


def _explain_reboot(error: VshError, entry: Entry, *, is_lost: bool) -> None:
    what = f"lost the connection to machine '{entry.name}'" if is_lost else f"machine '{entry.name}' does not answer"
    error.brief = f"{what}: the guest reboots"
    error.args = (error.brief,)
    error.details = ""
    error.hint = "connect again when vmkit list shows it as ready"


def _is_there(entry: Entry) -> bool:
    """True while this very machine is registered. A later machine of its name does not count."""
    now = registry.find_machine(name=entry.name)
    return now is not None and now.pid == entry.pid


def _hear_end(entry: Entry, grace_s: float) -> Ending | None:
    """Returns the monitor's report of the machine's end; None when none comes within grace_s seconds, or when the guest
    reboots.
    """
    deadline_s = time.monotonic() + grace_s
    text = b""
    if has_rebooted(entry):
        return None
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
                if text.endswith(b"}\n") and b'"reboot"' in text.splitlines()[-1]:
                    return None
        except OSError:
            # The monitor does not listen any more, or the machine goes on.
            pass
    for line in text.splitlines():
        try:
            return Ending({**json.loads(line), "pid": entry.pid})
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
