"""The one process that owns a machine: QEMU's parent, the ready listener, the logs, the control socket, the clean-up.

Started by vmkit.machine.handover and given a LaunchPlan; lives as long as its QEMU. When it is killed, the kernel kills
QEMU and the device with it (PR_SET_PDEATHSIG), and its lock on the machine's directory falls, so that the next `up`
sweeps what is left.

Life: bind every socket -> start the companions -> start QEMU paused -> take it over (QMP) -> plug the parts -> run ->
READY -> ... -> end -> clean up. What several parts share, above all the one End, is in vmkit.monitor.life. After a
reboot (vmkit.monitor.reboots) all of this begins again, but for the control socket and the console's.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from vmkit.architectures import HOST
from vmkit.entries.entry import discard
from vmkit.machine.launch import LaunchPlan, Layout, Report, Stage
from vmkit.machine.registry import write_record
from vmkit.machine.vhost import KernelVhostDoor, VhostDoor, claim_cid
from vmkit.machine.words import (
    SAVED,
    Answer,
    Disown,
    Ended,
    ExpectEnd,
    MeasureClock,
    Park,
    Pause,
    PlugFolder,
    Quit,
    Rebooted,
    Request,
    Resume,
    Save,
    Take,
    TakeKernelLog,
    TakeSyslog,
    UnplugFolder,
    Watch,
    name_of,
)
from vmkit.monitor.clock import DEADLINE_S as CLOCK_DEADLINE_S
from vmkit.monitor.clock import ClockKeeper
from vmkit.monitor.console import Console, ConsoleTrouble
from vmkit.monitor.control import ControlServer
from vmkit.monitor.end import End, QemuExit, explain_exit, explain_trouble
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.folders import Folders
from vmkit.monitor.guest import GuestLinks, LinkedGuest
from vmkit.monitor.hosting import HostServices
from vmkit.monitor.lastwords import LastWords, answer_with_log
from vmkit.monitor.life import Life, explain_failure
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.memory import GuestMemory
from vmkit.monitor.owner import MachineOwner
from vmkit.monitor.panics import PanicKeeper
from vmkit.monitor.pausing import Pausing
from vmkit.monitor.qemu import QemuDescriptors, listen_within, start_qemu
from vmkit.monitor.ready import ReadyListener, open_ready_listener, parse_facts, parse_wall_text
from vmkit.monitor.reboots import Reboots
from vmkit.monitor.stops import Stops

if TYPE_CHECKING:
    from vmkit.monitor.child import Child
    from vmkit.monitor.qmp import Qmp
    from vmkit.monitor.snapshots import Restore

CONSOLE_DRAIN_S = 1.0
# An `up` that does not read its reports is not waited for.
REPORT_DEADLINE_S = 1.0
# Events of QEMU that say nothing about a machine's fate and come in floods.
_QUIET_EVENTS = frozenset({"RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "VSERPORT_CHANGE"})


class Monitor:
    """One machine's monitor. Invariant: everything that was opened is on `_stack`; what is None was not reached."""

    def __init__(
        self,
        plan: LaunchPlan,
        report_sock: socket.socket,
        vhost_fd: int | None,
        open_ready: Callable[[LaunchPlan], ReadyListener] = open_ready_listener,
        owner_fd: int | None = None,
        door: VhostDoor | None = None,
    ) -> None:
        """owner_fd: a pidfd of the process that the machine ends with. door: to the host's own vsock, for a reboot."""
        self._plan = plan
        self._open_ready = open_ready
        self._report_sock = report_sock
        self._vhost_fd = vhost_fd
        self._owner = MachineOwner(owner_fd, self._on_owner_gone)
        self._door = door or KernelVhostDoor()
        self._life = Life()
        self._stack = contextlib.AsyncExitStack()
        self._events = EventLog(plan.directory / Layout.EVENTS)
        self._control = ControlServer(self._on_control)
        self._reboots = Reboots(is_wanted=plan.reboots)
        # Then the starter has its machine, and may go.
        self._was_ready = False
        self._console: Console | None = None
        self._is_saving = False
        # As the record has it.
        self._state = ""
        self._prepare_boot()

    def _prepare_boot(self) -> None:
        """Makes what each boot has anew."""
        plan = self._plan
        self._boot = contextlib.AsyncExitStack()
        self._shutdown_reason = ""
        # What the guest has told of itself, as in its record.
        self._facts: dict[str, object] = {}
        self._console_task: asyncio.Task[None] | None = None
        self._fittings = Fittings(plan.qemu.fittings, self._life, self._events, self._listen_unix, self._open_log)
        architecture = str(plan.record.get("architecture", HOST))
        self._memory = GuestMemory(plan.directory / Layout.KERNEL_LOG, architecture)
        self._boot.push_async_callback(self._memory.close)
        self._qemu: Child | None = None
        self._qmp: Qmp | None = None
        self._restore: Restore | None = None
        self._guest = LinkedGuest(plan, self._events, self._open_log, lambda: self._clock.is_stopped)
        self._links = GuestLinks(self._guest)
        self._hosting = HostServices(plan, self._guest, self._listen_unix, lambda: self._write_record(self._state))
        self._clock = ClockKeeper(partial(self._guest.open_clock, CLOCK_DEADLINE_S), self._events)
        self._pausing = Pausing(plan.name, self._clock, partial(self._write_record, must=True), self._owner.adopt)
        self._folders = Folders(plan.qemu.fittings, self._life, self._events)
        self._stops = Stops(self._life, self._pausing, self._events)
        self._panics = PanicKeeper(plan, self._life, self._events)

    # ---- the life -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """From nothing to cleaned up; the exit status is 0 when the end was expected."""
        loop = asyncio.get_running_loop()
        told = End("killed", "a signal ended the monitor", expected=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._life.stop, told)
        self._owner.watch()
        async with self._stack:
            while (end := await self._live_once()) is None:
                self._prepare_boot()
        return 0 if end.expected else 1

    async def _live_once(self) -> End | None:
        """One boot of the guest. Returns how the machine has ended; None: it boots again."""
        deadline = asyncio.get_running_loop().call_later(self._plan.timeout_s, self._on_deadline)
        async with self._boot:
            try:
                if not self._life.end.done():
                    await self._start()
                end = await self._life.end
            except Exception as error:
                self._life.finish(explain_failure(error))
                end = self._life.end.result()
            deadline.cancel()
            last = self._reboots.take(end, is_asked=self._life.is_asked)
            if last is None:
                self._tell_reboot()
            else:
                self._write_record("stopping")
            await self._stop_boot(end)
            if last is not None:
                await self._tell_end(last)
                return last
            await self._life.cancel_boot()
        self._life.renew()
        return None

    def _open(self) -> None:
        """What lasts as long as the machine, beside the console."""
        self._life.spawn(self._watch_parent(), is_lasting=True)
        self._life.spawn(self._control.serve(self._listen_unix(Layout.CONTROL, self._stack)), is_lasting=True)
        self._stack.push_async_callback(self._control.close)

    async def _start(self) -> None:
        self._write_record("starting")
        if not self._reboots.count:
            self._open()
        elif self._vhost_fd is not None:
            # QEMU has closed the last one, and the CID is free.
            self._vhost_fd = claim_cid(self._door, self._plan.cid)
        ready = self._open_ready(self._plan)
        self._boot.callback(ready.close)
        self._hosting.begin(self._life)
        console_sock = self._open_console()
        restore = self._restore = self._begin_restore()
        qmp_sock, qmp_fd = socket.socketpair()
        # All children start side by side; what the parts will be plugged with is ready when QEMU is.
        with contextlib.ExitStack() as stack:
            descriptors = await self._fittings.open(self._vhost_fd, stack)
            with console_sock, qmp_fd:
                self._qemu = await self._start_qemu(console_sock.fileno(), qmp_fd.fileno(), ready.port)
            self._events.add("qemu-started", {"pid": self._qemu.pid})
            self._life.spawn(self._watch_qemu(self._qemu))
            self._report(Report(Stage.STARTED))
            qmp = self._qmp = self._make_qmp()
            await self._life.or_end(qmp.connect(qmp_sock))
            self._life.spawn(qmp.listen(self._on_qmp_event))
            if restore is None:
                self._memory.seal()
            else:
                await self._life.or_end(restore.load(qmp))
                self._events.add("loaded")
            await self._fittings.plug(qmp, descriptors)
        if restore is None:
            self._life.spawn(self._watch_ready(ready))
        # Reported before it is done: the guest may send READY before QEMU has answered.
        self._write_record("starting")
        self._report(Report(Stage.RUNNING))
        await self._life.or_end(qmp.execute("cont"))
        if restore is not None:
            await self._life.or_end(self._thaw(restore))

    def _tell_reboot(self) -> None:
        """The record first: a client finds it, also when it was not connected."""
        self._life.is_ready = False
        self._facts = {}
        self._write_record("starting")
        self._events.add("reboot", {"reboots": self._reboots.count})
        self._control.announce_reboot(Rebooted(self._reboots.count))

    async def _stop_boot(self, end: End) -> None:
        if self._qemu is not None:
            await self._panics.settle(end, self._qemu, self._qmp)
            await self._qemu.stop()
            if self._qmp is not None:
                await self._qmp.close()
            await self._drain_console()
        await self._fittings.stop()

    async def _tell_end(self, end: End) -> None:
        words = LastWords(self._plan, self._events, self._console, self._panics)
        details = await words.collect(end, self._memory if self._qemu is not None else None)
        if not self._was_ready:
            self._report(Report(Stage.FAILED, end.brief, details, end.hint, end.expected))
        words.write(end, details)
        self._control.announce_end(Ended(end.reason, end.brief, end.expected))
        await self._life.cancel_all()
        self._events.close()
        discard(self._plan.directory)

    # ---- starting -------------------------------------------------------------------------------------------------

    def _listen_unix(self, name: str, stack: contextlib.AsyncExitStack | None = None) -> socket.socket:
        """stack: what closes it; None: the end of this boot."""
        return listen_within(self._plan.directory / name, stack or self._boot)

    def _open_console(self) -> socket.socket:
        ours, qemus = socket.socketpair()
        if self._console is None:
            self._console = Console(ours, self._open_log(Layout.CONSOLE_LOG, self._stack), self._on_trouble)
            self._stack.callback(self._console.close)
            listener = self._listen_unix(Layout.CONSOLE_SOCKET, self._stack)
            self._life.spawn(self._console.listen(listener), is_lasting=True)
        else:
            self._console.renew(ours)
        self._console_task = self._life.spawn(self._console.read_to_end())
        return qemus

    def _open_log(self, name: str, stack: contextlib.AsyncExitStack | None = None) -> CappedLog:
        log = CappedLog(self._plan.directory / name)
        (stack or self._boot).callback(log.close)
        return log

    async def _start_qemu(self, console_fd: int, qmp_fd: int, ready_port: int) -> "Child":
        log = self._open_log(Layout.QEMU_LOG)
        fds = QemuDescriptors(console=console_fd, qmp=qmp_fd, memory=self._memory.fd)
        return await start_qemu(self._plan, self._fittings, fds, ready_port, log)

    def _make_qmp(self) -> "Qmp":
        # Imported here: it takes as long as QEMU's own start, and so costs nothing.
        from vmkit.monitor.qmp import Qmp  # noqa: PLC0415

        return Qmp(self._plan.name, self._open_log(Layout.QMP_LOG))

    # ---- watching -------------------------------------------------------------------------------------------------

    async def _watch_parent(self) -> None:
        """Ends the machine when `up` closes its socket, or sends anything, before READY."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_recv(self._report_sock, 1)
        if not self._was_ready:
            self._life.stop(End("aborted", "vmkit up ended before the guest was ready", expected=True))

    async def _watch_qemu(self, qemu: "Child") -> None:
        status = await qemu.wait()
        await self._drain_console()
        seen = QemuExit(qemu.render_end(), status, self._shutdown_reason, qemu.render_tail())
        console = self._console
        self._life.finish(
            explain_exit(
                seen,
                console.trouble if console is not None else None,
                ready=self._life.is_ready,
                asked=self._life.is_asked,
                init_error=console.init_error if console is not None else None,
                known=[end for fitting in self._plan.qemu.fittings for end in fitting.ends],
            )
        )

    async def _watch_ready(self, listener: ReadyListener) -> None:
        facts = parse_facts(await listener.wait())
        listener.close()
        self._become_ready(facts)

    def _become_ready(self, facts: dict[str, object]) -> None:
        if self._life.end.done():
            # Too late: what is being torn down must not be called ready.
            return
        self._facts = facts
        # Where this cannot be written, vsh would not find what `up` calls ready: that fails, then.
        self._write_record("ready", must=True)
        self._life.is_ready = self._was_ready = True
        self._reboots.note_ready()
        self._events.add("ready", {"wall": {}, **facts})
        self._report(Report(Stage.READY))
        if self._plan.snapshot is None or self._restore is not None:
            # One that will be saved must have no session.
            self._boot.push_async_callback(self._clock.close)
            self._life.spawn(self._clock.keep())
            self._links.begin(self._life)

    def _begin_restore(self) -> "Restore | None":
        if self._plan.snapshot is None:
            return None
        from vmkit.monitor.snapshots import Restore  # noqa: PLC0415 - few machines are saved or restored

        restore = Restore(self._plan.snapshot, self._memory, self._plan.timeout_s)
        self._boot.push_async_callback(restore.close)
        return restore

    async def _thaw(self, restore: "Restore") -> None:
        thawed = await restore.thaw(self._guest.find_address(), self._plan.name)
        self._events.add("thawed", {"clock_error_ms": round(thawed.clock_error_ns / 1e6, 1)})
        self._become_ready(parse_wall_text(thawed.wall))

    def _begin_save(self, folder: Path) -> Answer:
        # A save ends every session, so only a machine that its starter owns is saved.
        is_new = self._plan.is_owned and self._restore is None and not self._is_saving
        if not is_new or not self._life.is_ready:
            return Answer(False, "this machine cannot be saved")
        if self._folders.count:
            hint = f"end its shares: vmkit unshare {self._plan.name} --all"
            return Answer(False, "this machine has a folder by virtiofs, and QEMU cannot save that", hint)
        self._is_saving = True
        self._life.spawn(self._save(folder))
        return Answer(True)

    async def _save(self, folder: Path) -> None:
        from vmkit.monitor.snapshots import save  # noqa: PLC0415 - few machines are saved or restored

        assert self._qmp is not None
        await save(folder, self._memory, self._qmp, self._fittings, self._guest.find_address(has_token=True))
        self._life.finish(End(SAVED, "the machine was saved", expected=True))

    async def _drain_console(self) -> None:
        """What the guest printed last is read when QEMU's end of the console closes."""
        if self._console_task is not None:
            await asyncio.wait([self._console_task], timeout=CONSOLE_DRAIN_S)

    def _on_owner_gone(self) -> None:
        self._life.stop(End("owner-gone", "the program that the machine belonged to has ended"))

    def _on_deadline(self) -> None:
        if not self._life.is_ready:
            brief = f"the guest was not ready within {self._plan.timeout_s:g} s"
            hint = "give it longer with --timeout, or watch it boot with --console"
            self._life.finish(End("timeout", brief, hint=hint))

    def _on_trouble(self, trouble: ConsoleTrouble) -> None:
        self._events.add(trouble.kind, {"text": trouble.text})
        if not self._life.is_ready:
            self._life.finish(explain_trouble(trouble))

    def _on_qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        if name in _QUIET_EVENTS:
            return
        self._events.add(name.lower(), {"data": dict(data)} if data else None)
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "STOP":
            self._life.spawn(self._stops.look(self._qmp, self._qemu))
        self._stops.note(name, data)
        self._panics.note(name, self._console)

    async def _on_control(self, request: Request) -> Answer:
        self._events.add("control", {"request": name_of(request), **asdict(request)})
        match request:
            case Watch():
                pass
            case ExpectEnd():
                self._life.is_asked = True
                self._write_record("stopping")
                if self._reboots.count and not self._life.is_ready:
                    # It cannot be asked.
                    self._life.stop(End("killed", "stopped by the host while the guest rebooted", expected=True))
            case Save():
                return self._begin_save(Path(request.folder))
            case Disown():
                self._owner.adopt(0)
            case Quit():
                self._life.is_asked = True
                self._life.stop(End("killed", "stopped by the host", expected=True))
            case TakeKernelLog():
                return await answer_with_log(self._memory)
            case TakeSyslog():
                return await self._links.answer(request)
            case Pause() | Resume() | MeasureClock() | Park() | Take() | PlugFolder() | UnplugFolder():
                if not self._life.is_ready or self._qmp is None or self._life.is_asked or self._is_saving:
                    return Answer(False, f"'{self._plan.name}' is not ready")
                if isinstance(request, PlugFolder | UnplugFolder):
                    return await self._folders.answer(request, self._qmp, is_running=self._state == "ready")
                return await self._pausing.answer(request, self._qmp)
            case _:
                assert_never(request)
        return Answer(True)

    # ---- telling --------------------------------------------------------------------------------------------------

    def _report(self, report: Report) -> None:
        with contextlib.suppress(OSError):
            self._report_sock.settimeout(REPORT_DEADLINE_S)
            self._report_sock.sendall(report.render())
        self._report_sock.setblocking(False)

    def _write_record(self, state: str, *, must: bool = False) -> None:
        self._state = state
        record = dict(self._plan.record, state="stopping" if self._life.is_asked else state, pid=os.getpid())
        if self._qemu is not None:
            record["qemu_pid"] = self._qemu.pid
        if self._reboots.is_wanted:
            record["reboots"] = self._reboots.count
        if self._hosting.ready_s is not None:
            record["vm_ready"] = self._hosting.ready_s
        record |= self._facts
        if self._pausing.trouble:
            record["trouble"] = self._pausing.trouble
        # On a full disk the old record stays, and is still whole.
        with contextlib.nullcontext() if must else contextlib.suppress(OSError):
            write_record(self._plan.directory, record)
