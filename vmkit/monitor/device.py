"""The vsock device of the `user` backend as the monitor sees it: a process to start, to watch, and to replace when it
dies under a running guest. What it does inside is vmkit.vsock's.
"""

import asyncio
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from vmkit.errors import MachineError, VmkitError
from vmkit.machine.launch import Layout
from vmkit.machine.qemu import USER_READY_PORT
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.end import End
from vmkit.monitor.life import Life
from vmkit.monitor.logs import CappedLog, EventLog

# A device process that dies is replaced. One that keeps dying ends the machine: more often than so many times in so
# many seconds. A machine that runs for weeks may replace many.
MAX_RESTARTS = 3
RESTART_PERIOD_S = 60.0
# QEMU's end closes the device's connection, and that ends the device: see first whether it was that.
QEMU_END_DEADLINE_S = 1.0
# The device ends by itself when QEMU has gone.
OWN_END_DEADLINE_S = 1.0

Replug = Callable[[socket.socket], Awaitable[None]]


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


class VsockDevice:
    """One machine's device processes, one after another. Invariant: `listener` outlives them all."""

    def __init__(self, directory: Path, cid: int, listener: socket.socket, log: CappedLog) -> None:
        self._argv = ["--guest-cid", str(cid), "--uds-path", str(directory / Layout.VSOCK)]
        self._listener = listener
        self._log = log
        self._child: Child | None = None

    async def start(self) -> socket.socket:
        """Starts a device process; the answer is QEMU's end of the connection to it, to be closed by the caller."""
        device_sock, qemu_sock = socket.socketpair()
        try:
            with device_sock:
                fds = (device_sock.fileno(), self._listener.fileno())
                self._child = await start_child("vsock device", self._render_argv(*fds), log=self._log, pass_fds=fds)
        except BaseException:
            qemu_sock.close()
            raise
        return qemu_sock

    async def watch(self, life: Life, events: EventLog, replug: Replug) -> None:
        """Replaces a device that ends under a running guest. replug gives QEMU the connection to the new one."""
        restarts = Restarts()
        while (child := self._child) is not None:
            events.add("device-started", {"pid": child.pid})
            await child.wait()
            events.add("device-ended", {"how": child.render_end(), "last": child.render_tail().rpartition("\n")[2]})
            await asyncio.wait({life.end}, timeout=QEMU_END_DEADLINE_S)
            if life.end.done():
                return
            if not life.is_ready:
                life.finish(_explain_end(child))
                return
            if not restarts.take():
                life.finish(_explain_end(child, f" after {MAX_RESTARTS} restarts within {RESTART_PERIOD_S:g} s"))
                return
            try:
                with await self.start() as qemu_sock:
                    await replug(qemu_sock)
            except (VmkitError, OSError) as error:
                brief = "the vsock device ended and could not be replaced"
                life.finish(End("device-exit", brief, details=str(error)))
                return
            events.add("device-replaced")

    async def raise_if_ended(self) -> None:
        """Raises MachineError with the last words of a process that has ended, or does so within a moment.

        QEMU's refusal of such a device names a protocol error, and not the cause.
        """
        child = self._child
        if child is None:
            return
        await asyncio.wait([asyncio.ensure_future(child.wait())], timeout=QEMU_END_DEADLINE_S)
        if child.returncode is not None:
            end = _explain_end(child)
            raise MachineError(end.brief, details=end.details)

    async def stop(self) -> None:
        """Sees the process gone."""
        if self._child is not None:
            await asyncio.wait([asyncio.ensure_future(self._child.wait())], timeout=OWN_END_DEADLINE_S)
            await self._child.stop()

    def _render_argv(self, frontend_fd: int, listen_fd: int) -> Sequence[str]:
        return [
            sys.executable, "-P", "-m", "vmkit.vsock", *self._argv,
            "--vhost-user-fd", str(frontend_fd),
            "--listen-fd", str(listen_fd),
            "--privileged-port", str(USER_READY_PORT),
            *(("--no-sandbox",) if os.environ.get("VMKIT_NO_SANDBOX") == "1" else ()),
        ]  # fmt: skip


def _explain_end(child: Child, often: str = "") -> End:
    return End("device-exit", f"the vsock device ended with {child.render_end()}{often}", details=child.render_tail())
