"""The services of ChromeOS's host for this guest (vmkit.cros): sockets, and a process that the first client starts.

A guest without such daemons costs a socket for each port. A process that dies is started again by the next client; one
that dies often is not.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec

from vmkit.cros.notes import DROPPED, PORTS, VM_READY
from vmkit.machine.launch import LaunchPlan, Layout
from vmkit.monitor.child import start_child
from vmkit.monitor.companion import Restarts
from vmkit.monitor.guest import LinkedGuest
from vmkit.monitor.life import Life
from vmkit.monitor.lines import parse_record
from vmkit.monitor.syslog import make_own, render_line
from vsh.errors import VshError
from vshd.carry.records import SYSLOG, LogReader, LogRecord, RecordError

READ_SIZE = 1 << 16
END_S = 1.0
NS = 1_000_000_000


class HostServices:
    """Invariant: while the process runs, no other is started; `ready_s` is when the guest's maitred first reported."""

    def __init__(
        self,
        plan: LaunchPlan,
        guest: LinkedGuest,
        listen: Callable[[str], socket.socket],
        tell_ready: Callable[[], None],
    ) -> None:
        """listen: makes a socket in the machine's directory, which is closed with the boot."""
        self.ready_s: float | None = None
        self._guest = guest
        self._listen = listen
        self._tell_ready = tell_ready
        # On vhost the machines share the host's ports.
        self._is_possible = bool(plan.ready_socket) and find_spec("grpclib") is not None

    def begin(self, life: Life) -> None:
        """Listens, from before the guest's first program on."""
        if self._is_possible:
            life.spawn(self._keep([self._listen(f"{Layout.VSOCK}_{port}") for port in PORTS]))

    async def _keep(self, listening: list[socket.socket]) -> None:
        restarts = Restarts()
        try:
            while restarts.take():
                await _wait_for_client(listening)
                await self._serve(listening)
        except (VshError, OSError) as error:
            self._guest.events.add("host-services-failed", {"why": str(error)})
        else:
            self._guest.events.add("host-services-failed", {"why": "their process died too often"})
        finally:
            # The guest's clients are refused from here on.
            for sock in listening:
                sock.close()

    async def _serve(self, listening: list[socket.socket]) -> None:
        """One process, to its end. Raises VshError where it cannot be started."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs:
                fds = [theirs.fileno(), *(sock.fileno() for sock in listening)]
                argv = [sys.executable, "-P", "-m", "vmkit.cros", *map(str, fds)]
                child = await start_child("host services", argv, log=None, pass_fds=fds)
            self._guest.events.add("host-services-started", {"pid": child.pid})
            try:
                await self._read(ours)
                # Its end comes right behind that of its notes.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(END_S):
                        await child.wait()
            except RecordError as error:
                self._guest.events.add("host-services-lied", {"why": str(error)})
            finally:
                await child.stop()
        self._guest.events.add("host-services-ended", {"why": child.render_end(), "last": child.render_tail()})

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = LogReader()
        with contextlib.suppress(ConnectionResetError):
            while data := await loop.sock_recv(sock, READ_SIZE):
                for note in reader.feed(data):
                    self._take(note)
                # sock_recv() does not wait as long as there is something to read.
                await asyncio.sleep(0)

    def _take(self, note: LogRecord) -> None:
        if note.source == VM_READY:
            if self.ready_s is None:
                self.ready_s = round(note.time_ns / NS, 3)
                self._guest.events.add("vm-ready")
                self._tell_ready()
            return
        if note.source == DROPPED:
            text = f"{note.number} records were dropped: the guest sent more than the host takes by LogCollector"
            value = make_own(text, dropped=note.number)
        else:
            # gRPC names no writer, and each program of the guest can connect.
            value = parse_record(LogRecord(SYSLOG, 0, note.text, flags=note.flags, time_ns=note.time_ns))
            value["source"] = "log_collector"
            del value["number"]
        self._guest.open_log(Layout.SYSLOG).write(render_line(self._guest, value))


async def _wait_for_client(listening: list[socket.socket]) -> None:
    """Until a connection waits in one of the sockets."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    for sock in listening:
        loop.add_reader(sock.fileno(), arrived.set)
    try:
        await arrived.wait()
    finally:
        for sock in listening:
            loop.remove_reader(sock.fileno())
