"""The lowest priority for this process and all that it starts: they take only what the host has to spare."""

import contextlib
import ctypes
import os
from pathlib import Path

LOWEST_NICE = 19
# The number of ioprio_set(2) on each processor, and its arguments of <linux/ioprio.h>.
IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13


def lower_priority() -> None:
    """Does what the host allows: none of it is worth a failure. A process cannot undo it.

    Not SCHED_IDLE: with 0.3 % of a busy processor a guest misses the deadlines of its save.
    """
    os.nice(LOWEST_NICE)
    # With autogroups the scheduler compares sessions, and this process has one of its own.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(LOWEST_NICE))
    number = IOPRIO_SET.get(os.uname().machine)
    if number is not None:
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE)
