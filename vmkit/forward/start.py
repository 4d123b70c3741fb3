"""Starts and ends the processes that keep forwards."""

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmkit.errors import HostError, MachineError
from vmkit.forward.registry import Kept, read_kept
from vmkit.machine.handover import end_by_entry, end_program, start_program
from vsh.errors import VshError
from vsh.forward.spec import DYNAMIC, LOCAL, ForwardSpec

# It listens as soon as its interpreter is up; a listener in the guest takes a session.
START_DEADLINE_S = 60.0
# It closes its sockets and goes.
MAX_ANSWER_BYTES = 1 << 20


def keep_forwards(machine: str, forwards: Sequence[ForwardSpec], *, user: str = "") -> Kept:
    """Starts a process that forwards for the machine of that name, until remove(). Raises VshError kinds.

    The forward outlives the machine. It closes connections while no such machine runs, and serves the next one.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = start_program("vmkit.forward.daemon", theirs, subprocess.DEVNULL)
        try:
            return _meet(ours, machine, forwards, user)
        except BaseException:
            end_program(process)
            raise


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


def _meet(ours: socket.socket, machine: str, forwards: Sequence[ForwardSpec], user: str) -> Kept:
    request = {
        "machine": machine,
        "user": user,
        "forwards": [(forward.kind, *_find_places(forward)) for forward in forwards],
    }
    ours.settimeout(START_DEADLINE_S)
    try:
        ours.sendall(json.dumps(request).encode() + b"\n")
        with ours.makefile("rb") as answers:
            line = answers.readline(MAX_ANSWER_BYTES)
    except OSError as error:
        raise HostError("the process of the forward does not answer") from error
    if not line:
        raise HostError("the process of the forward ended at once", hint="`python3 -m vmkit.forward.daemon` prints why")
    answer = json.loads(line)
    if "error" in answer:
        raise VshError(**answer["error"])
    return Kept(**{**answer, "forwards": tuple(answer["forwards"]), "listening": tuple(answer["listening"])})


def _find_places(forward: ForwardSpec) -> tuple[str, str]:
    """Returns where it listens and connects. Makes this host's paths absolute: the daemon has another directory."""
    if forward.kind in (LOCAL, DYNAMIC):
        return _make_absolute(forward.listen), forward.target
    return forward.listen, _make_absolute(forward.target)


def _make_absolute(place: str) -> str:
    kind, _, path = place.partition(":")
    return f"unix:{Path(path).absolute()}" if kind == "unix" else place
