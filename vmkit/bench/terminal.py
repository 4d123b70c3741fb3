"""Sends keystrokes to a terminal of the guest, and times their echo."""

import select
import statistics
import time

from vmkit.bench.programs import Running
from vmkit.errors import HostError

ECHOES = 30
DEADLINE_S = 15.0
READY = b"echoing"
# Not with the modes that the client has asked for: ssh behind a ControlMaster asks for none at all, not even the echo,
# when its stdin is no terminal.
ECHOING = f"stty sane; echo {READY.decode()}; exec cat"


def await_echoing(program: Running) -> None:
    """Waits until ECHOING has a terminal of the guest. Raises HostError."""
    seen = b""
    while not seen.endswith(READY + b"\r\n"):
        seen += _read_byte(program)


def time_echoes(program: Running) -> float:
    """Returns the median seconds of ECHOES keystrokes in a line. Raises HostError."""
    taken = []
    for _ in range(ECHOES):
        started_s = time.perf_counter()
        program.stdin.write(b"x")
        if _read_byte(program) != b"x":
            raise HostError("a terminal of the guest does not echo")
        taken.append(time.perf_counter() - started_s)
    # The line's end, its echo and cat's answer are not timed.
    program.stdin.write(b"\n")
    seen = b""
    while seen.count(b"\n") < 2:
        seen += _read_byte(program)
    return statistics.median(taken)


def _read_byte(program: Running) -> bytes:
    if not select.select([program.stdout], [], [], DEADLINE_S)[0]:
        raise HostError("a terminal of the guest prints nothing")
    byte = program.stdout.read(1)
    if not byte:
        raise HostError("a terminal of the guest has ended")
    return byte
