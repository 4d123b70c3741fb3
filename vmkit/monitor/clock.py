"""The guest's clock in the monitor: measures it, sets it where it is off, and pauses and resumes the guest.

A guest that was stopped is late. One that runs may drift, and the host's own clock may be set. The connection to the
guest's clock stays open, so the time reaches a guest that is resumed before anything else does.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from vmkit.monitor.logs import EventLog
from vsh.errors import VshError

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp
    from vsh.clock import GuestClock, Offset

T = TypeVar("T")

# The first time, the commands that follow READY have the guest's processor to themselves.
FIRST_S = 30.0
INTERVAL_S = 60.0
# Less than this is left alone: a clock that steps disturbs programs more.
TOLERANCE_NS = 50_000_000
# A guest under emulation on a busy host takes seconds for a session.
DEADLINE_S = 20.0


class GuestPaused(VshError):  # noqa: N818 - a state, not a fault
    """The guest cannot answer until it is resumed."""


class ClockKeeper:
    """The clock of one guest. Invariant: at most one thread uses the connection."""

    def __init__(self, connect: "Callable[[], GuestClock]", events: EventLog) -> None:
        """connect: opens the connection, in a thread."""
        self._connect = connect
        self._events = events
        self._using = asyncio.Lock()
        self._open: GuestClock | None = None
        # No exchange is under way while the guest is stopped, but that of resume().
        self._is_stopped = False

    @property
    def is_stopped(self) -> bool:
        """Whether the guest's processors are stopped."""
        return self._is_stopped

    async def measure(self) -> "Offset":
        """How far the guest's clock is off. Raises VshError."""
        return await self._use(lambda clock: clock.measure())

    async def keep(self) -> None:
        """Sets the clock whenever it is off by more than the tolerance, until the guest does not answer."""
        await asyncio.sleep(FIRST_S)
        while True:
            if not self._is_stopped:
                try:
                    await self.correct()
                except GuestPaused:
                    pass
                except VshError as error:
                    self._events.add("no-clock", {"why": error.brief})
                    return
            await asyncio.sleep(INTERVAL_S)

    async def correct(self) -> None:
        """Sets the clock where it is off by more than the tolerance. Raises VshError."""
        offset = await self._use(_correct)
        if _is_off(offset):
            self._events.add("clock-set", {"ahead_ms": round(offset.ahead_ns / 1e6, 1)})

    async def pause(self, qmp: "Qmp") -> None:
        """Stops the guest. Raises MachineError."""
        # Held until the guest has stopped: an exchange that begins meanwhile would wait for its deadline.
        async with self._using:
            # A guest without the service is paused all the same, and late afterwards.
            with contextlib.suppress(VshError):
                await self._run_in_thread(lambda _clock: None)
            self._is_stopped = True
            try:
                await qmp.execute("stop")
            except BaseException:
                self._is_stopped = False
                raise

    def note_stop(self) -> None:
        """The guest has stopped by itself."""
        self._is_stopped = True

    async def resume(self, qmp: "Qmp") -> "asyncio.Task[Offset]":
        """Lets the guest run. The task ends when its clock is set, with how late it was; or raises VshError.

        Raises MachineError.
        """
        # The word waits in the device, and is what the guest reads first.
        setting = asyncio.create_task(self._use(lambda clock: clock.set(), is_resuming=True))
        try:
            await qmp.execute("cont")
        except BaseException:
            await asyncio.gather(setting, return_exceptions=True)
            raise
        self._is_stopped = False
        return setting

    async def close(self) -> None:
        """Closes the connection, when its last user is done."""
        async with self._using:
            clock, self._open = self._open, None
            if clock is not None:
                clock.close()

    async def _use(self, work: "Callable[[GuestClock], T]", *, is_resuming: bool = False) -> T:
        """Runs work in a thread, with the connection. Raises VshError."""
        async with self._using:
            if self._is_stopped and not is_resuming:
                raise GuestPaused("the guest is paused")
            return await self._run_in_thread(work)

    async def _run_in_thread(self, work: "Callable[[GuestClock], T]") -> T:
        job = asyncio.create_task(asyncio.to_thread(self._run, work))
        try:
            return await asyncio.shield(job)
        finally:
            # A thread cannot be cancelled.
            await asyncio.gather(job, return_exceptions=True)

    def _run(self, work: "Callable[[GuestClock], T]") -> T:
        clock, self._open = self._open, None
        clock = clock or self._connect()
        # An error of the work has closed it.
        result = work(clock)
        self._open = clock
        return result


def _correct(clock: "GuestClock") -> "Offset":
    """In one piece: a pause comes before it or after it. How far the clock was off."""
    offset = clock.measure()
    if _is_off(offset):
        clock.set()
    return offset


def _is_off(offset: "Offset") -> bool:
    return abs(offset.ahead_ns) > TOLERANCE_NS + offset.error_ns
