"""What the parts of a monitor share while its machine lives: one end, and the tasks that may bring it.

Whatever happens first decides: every watcher calls `finish`, and the first End wins. A task that fails is an end, too:
a monitor that has lost one of its parts must not look well.
"""

import asyncio
import sys
import traceback
from collections.abc import Coroutine
from typing import cast

from vmkit.errors import MachineError, VmkitError
from vmkit.monitor.end import End
from vsh.errors import VshError
from vsh.limits import add_remedy, find_remedy

# The end of a companion closes its connection to QEMU. See first whether it was QEMU's end that ended the companion.
QEMU_END_DEADLINE_S = 1.0
# Of a companion whose connection QEMU has found closed, on a busy host.
COMPANION_END_DEADLINE_S = 5.0
# A QMP that breaks off, or a step that fails, most often has one of these as its cause, which is seen later and is the
# better explanation.
CAUSE_DEADLINE_S = QEMU_END_DEADLINE_S + COMPANION_END_DEADLINE_S


class RefusedError(MachineError):
    """QEMU lives, and has refused a command: its end is not the cause, and need not be waited for."""


class EndedError(VmkitError):
    """A step was given up because the machine's end came first; `end` is that end."""

    def __init__(self, end: End) -> None:
        super().__init__(end.brief, details=end.details, hint=end.hint)
        self.end = end


class Life:
    """Invariant: `end` is set at most once for each boot; every task is in one of the sets until it is done.

    is_ready: the guest has sent READY. is_asked: a verb on the host has asked for the end.
    """

    def __init__(self) -> None:
        self.end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.is_ready = False
        self.is_asked = False
        self._stop: End | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lasting: set[asyncio.Task[None]] = set()

    def finish(self, end: End) -> None:
        """The machine ends like this, unless it has ended already."""
        if not self.end.done():
            self.end.set_result(end)

    def stop(self, end: End) -> None:
        """The same, for an end that the host wants: it counts as well when it comes between two boots."""
        self._stop = self._stop or end
        self.finish(end)

    async def cancel_boot(self) -> None:
        """Ends every task but the lasting ones."""
        await self._cancel(self._tasks)

    def renew(self) -> None:
        """Begins the life of the guest's next boot, after cancel_boot()."""
        self.end = asyncio.get_running_loop().create_future()
        self.is_ready = False
        if self._stop is not None:
            self.finish(self._stop)

    def spawn(self, work: Coroutine[None, None, None], *, is_lasting: bool = False) -> "asyncio.Task[None]":
        """Runs work beside everything else, until it is done or the machine has ended.

        is_lasting: it goes on when the guest boots again.
        """
        task = asyncio.create_task(work)
        (self._lasting if is_lasting else self._tasks).add(task)
        task.add_done_callback(self._on_done)
        return task

    async def or_end(self, work: Coroutine[None, None, object]) -> None:
        """Awaits a step of the start. Raises EndedError when the end comes first (QEMU exits, `up` goes away)."""
        task = asyncio.ensure_future(work)
        both: set[asyncio.Future[object]] = {task, cast("asyncio.Future[object]", self.end)}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not self.end.done() and not isinstance(task.exception(), RefusedError | None):
            await asyncio.wait({self.end}, timeout=CAUSE_DEADLINE_S)
        if self.end.done():
            task.cancel()
            # Takes the step's own error, too: asyncio would print one that nothing has asked for.
            await asyncio.gather(task, return_exceptions=True)
            raise EndedError(self.end.result())
        await task

    async def cancel_all(self) -> None:
        """Ends every task."""
        await self._cancel(self._tasks | self._lasting)

    async def _cancel(self, tasks: "set[asyncio.Task[None]]") -> None:
        waited = list(tasks)
        for task in waited:
            task.cancel()
        await asyncio.gather(*waited, return_exceptions=True)

    def _on_done(self, task: "asyncio.Task[None]") -> None:
        finish = self.stop if task in self._lasting else self.finish
        self._tasks.discard(task)
        self._lasting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            finish(explain_failure(error))


def explain_failure(error: BaseException) -> End:
    """Turns an exception in the monitor into an end. An unforeseen one leaves its traceback in monitor.log."""
    match error:
        case EndedError():
            return error.end
        case VshError():
            add_remedy(error)
            return End("start-failed", error.brief, details=error.details, hint=error.hint)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            brief = f"the machine's monitor failed: {where}{error.strerror or error}"
            return End("monitor-error", brief, hint=find_remedy(error))
    traceback.print_exception(error, file=sys.stderr)
    return End(
        "monitor-error", f"the machine's monitor failed: {error!r}", hint="this is a fault of vmkit; see its logs"
    )
