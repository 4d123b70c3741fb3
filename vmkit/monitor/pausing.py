"""Answers the requests that stop a guest, let it run again, and compare its clock with the host's.

A guest runs, or is paused by a person or because a disk takes no data, or is parked in a pool. Each change is written
into the machine's record.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmkit.machine.words import Answer, MeasureClock, Park, Pause, Resume, Take
from vmkit.monitor.clock import ClockKeeper
from vsh.errors import VshError
from vsh.limits import find_remedy

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp
    from vsh.clock import Offset

_MAKE_ROOM = "make room where the file is, and resume it again"
READY, PAUSED, PARKED = "ready", "paused", "pooled"


class Pausing:
    """Invariant: `_state` is the record's, and the guest is stopped unless it is READY."""

    def __init__(
        self, name: str, clock: ClockKeeper, write_state: Callable[[str], None], adopt: Callable[[int], None]
    ) -> None:
        """write_state: writes the record, or raises OSError. adopt: makes the machine end with that process id, or with
        none for 0.
        """
        self._name = name
        self._clock = clock
        self._write_state = write_state
        self._adopt = adopt
        self._state = READY
        # Why it is paused although no person asked for it; "": it is not.
        self.trouble = ""
        # One request at a time.
        self._changing = asyncio.Lock()
        self._setting: asyncio.Task[Offset] | None = None

    def note_stop(self, why: str) -> None:
        """The guest has stopped by itself: a Resume lets it run, as soon as it can. Raises OSError."""
        self._clock.note_stop()
        self.trouble = why
        self._become(PAUSED)

    async def answer(self, request: Pause | Resume | MeasureClock | Park | Take, qmp: "Qmp") -> Answer:
        """Does what is asked, or says why not."""
        async with self._changing:
            try:
                return await self._do(request, qmp)
            except VshError as error:
                return Answer(False, error.brief, error.hint)
            except OSError as error:
                brief = f"cannot write the record of '{self._name}': {error.strerror}"
                return Answer(False, brief, find_remedy(error) or "free some room, and ask again")

    async def _do(self, request: Pause | Resume | MeasureClock | Park | Take, qmp: "Qmp") -> Answer:
        match request:
            case MeasureClock() if self._state == READY:
                offset = await self._clock.measure()
                ahead_ms, error_ms = (round(value / 1e6, 1) for value in (offset.ahead_ns, offset.error_ns))
                return Answer(True, values={"ahead_ms": ahead_ms, "error_ms": error_ms})
            case Pause() | Park() if self._state == READY:
                await self._clock.pause(qmp)
                self._become(PAUSED if isinstance(request, Pause) else PARKED)
                return Answer(True)
            case Resume() if self._state == PAUSED:
                return await self._resume(qmp)
            case Take() if self._state == PARKED:
                return await self._take(request.owner, qmp)
            case Pause() if self._state == PAUSED:
                # The record can be an older one.
                self._become(PAUSED)
                return Answer(True)
            case Resume() if self._state == READY:
                self._become(READY)
                return Answer(True)
        return Answer(False, f"'{self._name}' is {self._state}", "vmkit pool take" if self._state == PARKED else "")

    async def _resume(self, qmp: "Qmp") -> Answer:
        self.trouble = ""
        setting = await self._clock.resume(qmp)
        setting.add_done_callback(_forget)
        if not self.trouble:
            self._become(READY)
        try:
            late = await setting
        except VshError as error:
            if self.trouble:
                return Answer(False, f"'{self._name}' has stopped again: {self.trouble}", _MAKE_ROOM)
            # The guest runs, and that was asked for first.
            return Answer(True, values={"why": error.brief})
        return Answer(True, values={"late_ms": round(-late.ahead_ns / 1e6, 1)})

    async def _take(self, owner: int, qmp: "Qmp") -> Answer:
        try:
            self._adopt(owner)
        except OSError as error:
            return Answer(False, f"cannot watch the process {owner}: {error.strerror}")
        # The taker does not wait for the clock: its time is what the guest reads first.
        self._setting = await self._clock.resume(qmp)
        self._setting.add_done_callback(_forget)
        self._become(READY)
        return Answer(True)

    def _become(self, state: str) -> None:
        self._state = state
        self._write_state(state)


def _forget(setting: "asyncio.Task[Offset]") -> None:
    """Takes the error of a task whose result may not be asked for: asyncio would print it."""
    if not setting.cancelled():
        setting.exception()
