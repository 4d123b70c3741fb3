"""Pauses machines, lets them run again, and compares a guest's clock with the host's: requests to the monitor."""

from dataclasses import dataclass

from vmkit.errors import MachineError
from vmkit.machine.stop import open_control
from vmkit.machine.words import Answer, Disown, MeasureClock, Park, Pause, Request, Resume, Take
from vsh.registry import Entry

# A guest under emulation on a busy host takes seconds for a session, and the monitor gives it 20.
DEADLINE_S = 45.0


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """How far a guest's clock is ahead of the host's, and how far off that figure can be, in milliseconds."""

    ahead_ms: float
    error_ms: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """late_ms: how late the guest's clock was; None when it could not be set, and `why`."""

    late_ms: float | None
    why: str = ""


def pause(entry: Entry) -> None:
    """Stops the guest's processors. Its sessions and forwards wait. Raises MachineError."""
    _ask(entry, Pause(), "pause")


def resume(entry: Entry) -> Resumed:
    """Lets a paused guest run, with the right time. Raises MachineError."""
    values = _ask(entry, Resume(), "resume").values
    late_ms = values.get("late_ms", 0.0 if "why" not in values else None)
    return Resumed(None if late_ms is None else float(str(late_ms)), str(values.get("why", "")))


def park(entry: Entry) -> None:
    """Pauses a machine for a pool: only take() lets it run. Raises MachineError."""
    _ask(entry, Park(), "park")


def take(entry: Entry, owner: int = 0, timeout_s: float = DEADLINE_S) -> None:
    """Lets a parked machine run, as the caller's own. owner: the process id that it ends with; 0: none.

    Raises MachineError.
    """
    _ask(entry, Take(owner), "take", timeout_s)


def disown(entry: Entry) -> None:
    """The machine goes on when the process that it belongs to ends. Raises MachineError."""
    _ask(entry, Disown(), "disown")


def measure_clock(entry: Entry, timeout_s: float = DEADLINE_S) -> ClockOffset:
    """Compares the guest's clock with the host's. Raises MachineError."""
    values = _ask(entry, MeasureClock(), "measure the clock of", timeout_s).values
    return ClockOffset(float(str(values["ahead_ms"])), float(str(values["error_ms"])))


def _ask(entry: Entry, request: Request, what: str, timeout_s: float = DEADLINE_S) -> Answer:
    with open_control(entry) as control:
        answer = control.ask(request, timeout_s)
    if not answer.ok:
        raise MachineError(f"cannot {what} '{entry.name}': {answer.error}", hint=answer.hint)
    return answer
