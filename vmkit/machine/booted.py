"""Whether the systemd of a guest has finished its boot, and which of its units have failed.

A machine is ready as soon as vshd serves, which does not wait for the root's own init. systemd's tools tell the rest
in a session.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from vmkit.errors import MachineError
from vmkit.machine.running import explain_ending
from vsh.address import NotReady, address_of
from vsh.client import Client
from vsh.ending import await_ending
from vsh.errors import ConnectionLost, Unreachable
from vsh.pump import TimedOut
from vsh.registry import Entry
from vsh.text import clean_line

SYSTEMD = "systemd"
# The word for a guest without systemd: ready is all that it becomes.
READY = "ready"
RUNNING = "running"
# What systemctl prints once a boot is over: systemctl(1), is-system-running.
OVER = (RUNNING, "degraded", "maintenance", "stopping")
KNOWN = (*OVER, "initializing", "starting")
# systemctl fails until systemd serves it, and announces nothing.
LOOK_EVERY_S = 0.5
OUTPUT_LIMIT_BYTES = 1 << 20
# For the names of the units, where the boot was over in the last moment.
LEAST_S = 5.0
# Of the units that have failed, in one line.
SHOWN_UNITS = 20
# Characters of a unit's name (UNIT_NAME_MAX in systemd's unit-name.h).
WORD_LIMIT = 255

# systemctl with these words, within seconds: the lines that it prints.
Ask = Callable[[list[str], float], list[str]]


@dataclass(frozen=True, slots=True)
class BootState:
    """state: as `systemctl is-system-running` has it; `ready` without systemd. failed: the names of failed units."""

    state: str
    failed: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        """Whether the boot is over, and no unit has failed."""
        return self.state in (RUNNING, READY)

    def render(self) -> str:
        """In one line."""
        if not self.failed:
            return self.state
        names = ", ".join(self.failed[:SHOWN_UNITS])
        more = len(self.failed) - SHOWN_UNITS
        return f"{self.state}, failed units: {names}" + (f" and {more} more" if more > 0 else "")


def has_systemd(entry: Entry) -> bool:
    """Whether pid 1 of the guest is the systemd of its root."""
    return entry.record.get("init") == SYSTEMD


def read_boot(entry: Entry, timeout_s: float) -> BootState:
    """The state as it is now; that of a guest that does not answer is empty. Raises VshError kinds."""
    return look(partial(_run, entry), timeout_s)


def wait_booted(entry: Entry, timeout_s: float) -> BootState:
    """Waits until the boot of the guest's systemd is over. Raises MachineError at the deadline, VshError kinds."""
    return await_boot(entry.name, partial(_run, entry), timeout_s) if has_systemd(entry) else BootState(READY)


def look(ask: Ask, timeout_s: float) -> BootState:
    """What systemctl says now; empty where it cannot tell. Raises what `ask` does."""
    end_s = time.monotonic() + timeout_s
    state = _find_word(ask(["is-system-running"], timeout_s))
    return _complete(ask, state if state in KNOWN else "", end_s)


def await_boot(name: str, ask: Ask, timeout_s: float) -> BootState:
    """Waits until systemctl says that the boot is over. Raises MachineError at the deadline, and what `ask` does."""
    end_s = time.monotonic() + timeout_s
    state = ""
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            state = _find_word(ask(["is-system-running", "--wait"], left_s))
        except TimedOut:
            state = "starting"
            break
        if state in OVER:
            return _complete(ask, state, end_s)
        time.sleep(min(LOOK_EVERY_S, max(0.0, end_s - time.monotonic())))
    raise MachineError(
        f"'{name}' has not booted after {timeout_s:g} s" + (f": systemd is {state}" if state else ""),
        hint=f"it still runs; see what it waits for: vsh --vm_name {name} -- systemctl list-jobs",
    )


def _complete(ask: Ask, state: str, end_s: float) -> BootState:
    """The state with the units that have failed."""
    if state not in OVER or state == RUNNING:
        return BootState(state)
    words = ["list-units", "--state=failed", "--plain", "--no-legend", "--no-pager"]
    lines = ask(words, max(LEAST_S, end_s - time.monotonic()))
    return BootState(state, tuple(word for word in map(_find_first, lines) if word))


def _find_word(lines: list[str]) -> str:
    """The state that systemctl has printed; empty where it has printed none."""
    return _find_first(lines[0]) if lines else ""


def _find_first(line: str) -> str:
    """The first word of a line that a guest has written."""
    return clean_line(line).partition(" ")[0][:WORD_LIMIT]


def _run(entry: Entry, words: list[str], timeout_s: float) -> list[str]:
    """Runs systemctl; no lines where vshd cannot be reached just now. Raises MachineError for an ended machine."""
    try:
        client = Client(address_of(entry), timeout_s=timeout_s)
        argv = ["systemctl", *words]
        done = client.run(argv, text=True, timeout=timeout_s, errors="replace", output_limit_bytes=OUTPUT_LIMIT_BYTES)
    except (ConnectionLost, Unreachable, NotReady) as error:
        ending = await_ending(entry)
        if ending is not None:
            raise explain_ending(entry.name, ending) from error
        # A vshd that is started again serves the next call.
        return []
    return done.stdout.splitlines()
