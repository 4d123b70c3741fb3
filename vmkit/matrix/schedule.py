"""Which cell of a job is next, and when the job stops. Pure: it starts nothing, and has no clock.

    waiting --take--> running --finish--> done
                         |
                         +----finish----> waiting (the machine failed, and there are retries left)

A stop (too many failures, the deadline) drops what waits. So a cell of the job is done, or it is dropped with a reason;
no cell is lost, and none is done twice.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from vmkit.matrix.results import CellFault


@dataclass(frozen=True, slots=True)
class Policy:
    """retries: how often a cell whose machine failed runs again. max_failures: of cells, then no other one starts."""

    retries: int = 0
    max_failures: int | None = None


class Schedule:
    """Invariant: each number is in exactly one of `_waiting`, `running`, `done` and `dropped`."""

    def __init__(self, numbers: Iterable[int], policy: Policy) -> None:
        self._waiting = deque(numbers)
        self._policy = policy
        self._retries: dict[int, int] = {}
        self.running: set[int] = set()
        self.done: dict[int, CellFault] = {}
        self.dropped: list[int] = []
        # Cells that did not pass.
        self.failures = 0
        # Why cells were dropped; empty while the job goes on.
        self.stopped = ""

    @property
    def is_over(self) -> bool:
        return not self._waiting and not self.running

    @property
    def _has_failed_enough(self) -> bool:
        limit = self._policy.max_failures
        return limit is not None and self.failures >= limit

    def take(self) -> int | None:
        """Returns the cell to run now. None: no cell is waiting."""
        if not self._waiting:
            return None
        number = self._waiting.popleft()
        self.running.add(number)
        return number

    def finish(self, number: int, fault: CellFault) -> bool:
        """Takes a result. Returns whether the cell runs again."""
        self.running.remove(number)
        tried = self._retries.get(number, 0)
        may_repeat = tried < self._policy.retries and not self.stopped and not self._has_failed_enough
        if fault is CellFault.MACHINE and may_repeat:
            self._retries[number] = tried + 1
            # Behind all others: what the host lacked may be there by then.
            self._waiting.append(number)
            return True
        self._end(number, fault)
        return False

    def stop(self, reason: str) -> None:
        """Starts no other cell. The first reason stays."""
        self.stopped = self.stopped or reason
        self.dropped += self._waiting
        self._waiting.clear()

    def _end(self, number: int, fault: CellFault) -> None:
        self.done[number] = fault
        self.failures += fault is not CellFault.NONE
        if self._has_failed_enough and self._waiting:
            limit = self._policy.max_failures
            cells = "cell" if limit == 1 else "cells"
            self.stop(f"{limit} {cells} failed, and --max-failures is {limit}")
