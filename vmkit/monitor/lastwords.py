"""What a machine leaves: its logs, and the record of how it ended.

Written before the end is announced: a client finds the record, also when the monitor no longer answers.
"""

import os
import time

from vmkit.errors import MachineError
from vmkit.machine.launch import LaunchPlan
from vmkit.machine.registry import write_ending
from vmkit.machine.words import Answer
from vmkit.monitor.console import Console
from vmkit.monitor.end import End, plan_ending, render_details
from vmkit.monitor.evidence import keep_evidence
from vmkit.monitor.logs import EventLog
from vmkit.monitor.memory import GuestMemory
from vmkit.monitor.panics import PanicKeeper
from vsh.limits import find_remedy

CONSOLE_LINES = 15
KERNEL_LINES = 15


async def answer_with_log(memory: GuestMemory) -> Answer:
    """Puts the kernel's log of a guest that runs beside the other logs, or says why not."""
    try:
        await memory.take_log()
    except MachineError as error:
        return Answer(False, error.brief, error.hint)
    except OSError as error:
        return Answer(False, f"cannot write the kernel's log: {error.strerror}", find_remedy(error))
    return Answer(True)


class LastWords:
    """Of one machine. console: None where the start did not come so far."""

    def __init__(self, plan: LaunchPlan, events: EventLog, console: Console | None, panics: PanicKeeper) -> None:
        self._plan = plan
        self._panics = panics
        self._events = events
        self._console = console

    async def collect(self, end: End, memory: GuestMemory | None) -> str:
        """Keeps the logs, where the end was not asked for. Returns what a person needs beside the end's brief.

        memory: what QEMU has left; None where no QEMU was started.
        """
        has_init_error = self._console is not None and self._console.init_error is not None
        is_kept = not end.expected or has_init_error or end.reason == "panic"
        kernel = await self._take_kernel_log(memory) if is_kept and memory is not None else ""
        await self._panics.publish(end)
        self._events.add("end", {"reason": end.reason, "brief": end.brief, "expected": end.expected})
        if is_kept:
            keep_evidence(self._plan.directory, self._plan.evidence, self._plan.companion_logs)
        console = self._console.tail(CONSOLE_LINES) if self._console is not None else ""
        return render_details(end, console, kernel)

    def write(self, end: End, details: str) -> None:
        """Records the end for those who ask later."""
        write_ending(self._plan.directory, plan_ending(end, details, os.getpid(), time.time()))

    async def _take_kernel_log(self, memory: GuestMemory) -> str:
        """Puts the kernel's log beside the other logs; returns its last lines."""
        try:
            return await memory.take_tail(KERNEL_LINES)
        except (MachineError, OSError) as error:
            self._events.add("no-kernel-log", {"why": str(error)})
            return ""
