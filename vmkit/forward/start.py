"""Starts and ends the processes that keep forwards."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmkit.errors import MachineError
from vmkit.forward.registry import Kept, read_kept
from vmkit.machine.programs import end_by_entry, start_and_ask
from vsh.forward.spec import DYNAMIC, LOCAL, ForwardSpec


def keep_forwards(machine: str, forwards: Sequence[ForwardSpec], *, user: str = "") -> Kept:
    """Starts a process that forwards for the machine of that name, until remove(). Raises VshError kinds.

    The forward outlives the machine. It closes connections while no such machine runs, and serves the next one.
    """
    request = {
        "machine": machine,
        "user": user,
        "forwards": [(forward.kind, *_find_places(forward)) for forward in forwards],
    }
    answer = start_and_ask("vmkit.forward.daemon", "forward", request)
    return Kept(**{**answer, "forwards": tuple(answer["forwards"]), "listening": tuple(answer["listening"])})


@contextlib.contextmanager
def open_forwards(machine: str, forwards: Sequence[ForwardSpec], *, user: str = "") -> Iterator[Kept]:
    """Keeps forwards for as long as the block lasts."""
    kept = keep_forwards(machine, forwards, user=user)
    try:
        yield kept
    finally:
        remove(kept)


def remove(kept: Kept) -> None:
    """Ends a forward and all its connections. Raises MachineError when it does not end."""
    if not end_by_entry(kept.pid, lambda: kept in read_kept()):
        raise MachineError(f"the process {kept.pid} of forward {kept.number} does not end")


def _find_places(forward: ForwardSpec) -> tuple[str, str]:
    """Returns where it listens and connects. Makes this host's paths absolute: the daemon has another directory."""
    if forward.kind in (LOCAL, DYNAMIC):
        return _make_absolute(forward.listen), forward.target
    return forward.listen, _make_absolute(forward.target)


def _make_absolute(place: str) -> str:
    kind, _, path = place.partition(":")
    return f"unix:{Path(path).absolute()}" if kind == "unix" else place
