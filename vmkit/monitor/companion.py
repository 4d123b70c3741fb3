"""A part's companion as the monitor sees it: a process to start, to watch, to replace when it dies under a running
guest, and to stop. Its plan is the part's; the vsock device of the `user` backend is one.
"""

import asyncio
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable

from vmkit.errors import MachineError, VmkitError
from vmkit.machine.parts.part import CONTROL_MARK, FRONTEND_MARK, LISTENER_MARK, Companion
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.end import End
from vmkit.monitor.life import COMPANION_END_DEADLINE_S, QEMU_END_DEADLINE_S, Life
from vmkit.monitor.logs import CappedLog, EventLog

# A process that dies is replaced. One that keeps dying ends the machine: more often than so many times in so
# many seconds. A machine that runs for weeks may replace many.
MAX_RESTARTS = 3
RESTART_PERIOD_S = 60.0
# A companion ends by itself when QEMU has gone.
OWN_END_DEADLINE_S = 1.0

Replug = Callable[[socket.socket], Awaitable[None]]
# Makes the companion's end and QEMU's end of a connection.
Connect = Callable[[], tuple[socket.socket, socket.socket]]


class Restarts:
    """The times of the last restarts. Invariant: at most `limit` of them lie within any `period_s` seconds."""

    def __init__(
        self, limit: int = MAX_RESTARTS, period_s: float = RESTART_PERIOD_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._period_s = period_s
        self._clock = clock
        self._times_s: deque[float] = deque()

    def take(self) -> bool:
        """Counts a restart now; False, and nothing is counted, when there were too many lately."""
        now_s = self._clock()
        while self._times_s and self._times_s[0] <= now_s - self._period_s:
            self._times_s.popleft()
        if len(self._times_s) >= self._limit:
            return False
        self._times_s.append(now_s)
        return True


class CompanionProcess:
    """A companion's processes, one after another. Invariant: until stop(), its sockets outlive them all."""

    def __init__(
        self,
        plan: Companion,
        listener: socket.socket | None,
        log: CappedLog,
        control: socket.socket | None = None,
        connect: Connect = socket.socketpair,
    ) -> None:
        self._plan = plan
        self._listeners = {LISTENER_MARK: listener, CONTROL_MARK: control}
        self._log = log
        self._connect = connect
        self._child: Child | None = None
        self._is_dismissed = False

    async def start(self) -> socket.socket:
        """Starts a process; the answer is QEMU's end of the connection to it, to be closed by the caller."""
        own_sock, qemu_sock = self._connect()
        try:
            with own_sock:
                marks = {FRONTEND_MARK: own_sock.fileno()}
                marks |= {mark: sock.fileno() for mark, sock in self._listeners.items() if sock is not None}
                argv = [str(marks.get(word, word)) for word in self._plan.argv]
                fds = tuple(marks.values())
                self._child = await start_child(self._plan.title, argv, log=self._log, pass_fds=fds)
        except BaseException:
            qemu_sock.close()
            raise
        return qemu_sock

    async def watch(self, life: Life, events: EventLog, replug: Replug) -> None:
        """Replaces a process that ends under a running guest. replug gives QEMU the connection to the new one."""
        kind, restarts = self._plan.kind, Restarts()
        while (child := self._child) is not None:
            events.add(f"{kind}-started", {"pid": child.pid})
            await child.wait()
            events.add(f"{kind}-ended", {"how": child.render_end(), "last": child.render_tail().rpartition("\n")[2]})
            await asyncio.wait({life.end}, timeout=QEMU_END_DEADLINE_S)
            if life.end.done() or self._is_dismissed:
                return
            if not life.is_ready or self._plan.is_vital:
                life.finish(self._explain_end(child))
                return
            if not restarts.take():
                often = f" after {MAX_RESTARTS} restarts within {RESTART_PERIOD_S:g} s"
                life.finish(self._explain_end(child, often))
                return
            try:
                with await self.start() as qemu_sock:
                    await replug(qemu_sock)
            except (VmkitError, OSError) as error:
                brief = f"the {self._plan.title} ended and could not be replaced"
                life.finish(End(f"{kind}-exit", brief, details=str(error)))
                return
            events.add(f"{kind}-replaced")

    async def raise_if_ended(self) -> None:
        """Raises MachineError with the last words of a process that has ended, or does so within a moment.

        QEMU's refusal of such a device names a protocol error, and not the cause.
        """
        child = self._child
        if child is None:
            return
        await asyncio.wait([asyncio.ensure_future(child.wait())], timeout=COMPANION_END_DEADLINE_S)
        if child.returncode is not None:
            end = self._explain_end(child)
            raise MachineError(end.brief, details=end.details)

    def dismiss(self) -> None:
        """Its device is about to be taken out: the end of the process is wanted then."""
        self._is_dismissed = True

    async def stop(self) -> None:
        """Sees the process gone, and closes its sockets: no later one answers the connections that wait there."""
        if self._child is not None:
            await asyncio.wait([asyncio.ensure_future(self._child.wait())], timeout=OWN_END_DEADLINE_S)
            await self._child.stop()
        for sock in self._listeners.values():
            if sock is not None:
                sock.close()

    def _explain_end(self, child: Child, often: str = "") -> End:
        brief = f"the {self._plan.title} ended with {child.render_end()}{often}"
        return End(f"{self._plan.kind}-exit", brief, details=child.render_tail())
