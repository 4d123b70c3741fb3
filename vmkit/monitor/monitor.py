"""The one process that owns a machine: QEMU's parent, the ready listener, the logs, the control socket, the clean-up.

Started by vmkit.machine.handover and given a LaunchPlan; lives as long as its QEMU. When it is killed, the kernel kills
QEMU and the device with it (PR_SET_PDEATHSIG), and its lock on the machine's directory falls, so that the next `up`
sweeps what is left.

Life: bind every socket -> start the companions -> start QEMU paused -> take it over (QMP) -> plug the parts -> run ->
READY -> ... -> end -> clean up. What several parts share, above all the one End, is in vmkit.monitor.life.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from vmkit.architectures import HOST, find_package
from vmkit.entries.entry import discard
from vmkit.errors import MachineError
from vmkit.machine.argv import BY_HAND_NOTE
from vmkit.machine.launch import LaunchPlan, Layout, Report, Stage
from vmkit.machine.registry import write_ending, write_record
from vmkit.machine.words import (
    SAVED,
    Answer,
    Disown,
    Ended,
    ExpectEnd,
    MeasureClock,
    Park,
    Pause,
    Quit,
    Request,
    Resume,
    Save,
    Take,
    TakeKernelLog,
    Watch,
    name_of,
)
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.clock import DEADLINE_S as CLOCK_DEADLINE_S
from vmkit.monitor.clock import ClockKeeper
from vmkit.monitor.console import Console, ConsoleTrouble
from vmkit.monitor.control import ControlServer
from vmkit.monitor.end import End, QemuExit, explain_exit, explain_trouble, plan_ending, render_details
from vmkit.monitor.evidence import keep_evidence
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.life import Life, explain_failure
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.memory import GuestMemory
from vmkit.monitor.pausing import Pausing
from vmkit.monitor.ready import ReadyListener, open_ready_listener, parse_facts, parse_wall_text
from vmkit.monitor.stops import Stops
from vmkit.run import render_command
from vsh.limits import find_remedy
from vsh.registry import Entry

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp
    from vmkit.monitor.snapshots import Restore
    from vsh.address import Address
    from vsh.clock import GuestClock

CONSOLE_LINES = 15
KERNEL_LINES = 15
# A panicking kernel prints its trace after the first line, then resets; what has not come by then is not waited for.
TROUBLE_GRACE_S = 1.5
CONSOLE_DRAIN_S = 1.0
# An `up` that does not read its reports is not waited for.
REPORT_DEADLINE_S = 1.0
BACKLOG = 64
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
    ) -> None:
        """owner_fd: a pidfd of the process that the machine ends with."""
        self._plan = plan
        self._open_ready = open_ready
        self._report_sock = report_sock
        self._vhost_fd = vhost_fd
        self._owner_fd = owner_fd
        self._life = Life()
        self._stack = contextlib.AsyncExitStack()
        self._events = EventLog(plan.directory / Layout.EVENTS)
        self._control = ControlServer(self._on_control)
        self._shutdown_reason = ""
        # What the guest has told of itself, as in its record.
        self._facts: dict[str, object] = {}
        self._console: Console | None = None
        self._console_task: asyncio.Task[None] | None = None
        self._fittings = Fittings(plan.qemu.fittings, self._life, self._events, self._listen_unix, self._open_log)
        architecture = str(plan.record.get("architecture", HOST))
        self._memory = GuestMemory(plan.directory / Layout.KERNEL_LOG, architecture)
        self._stack.push_async_callback(self._memory.close)
        self._qemu: Child | None = None
        self._qmp: Qmp | None = None
        self._restore: Restore | None = None
        self._is_saving = False
        self._clock = ClockKeeper(self._open_clock, self._events)
        self._pausing = Pausing(plan.name, self._clock, partial(self._write_record, must=True), self._adopt)
        self._stops = Stops(self._life, self._pausing, self._events)

    # ---- the life -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """From nothing to cleaned up; the exit status is 0 when the end was expected."""
        loop = asyncio.get_running_loop()
        told = End("killed", "a signal ended the monitor", expected=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._life.finish, told)
        if self._owner_fd is not None:
            loop.add_reader(self._owner_fd, self._on_owner_gone, self._owner_fd)
        deadline = loop.call_later(self._plan.timeout_s, self._on_deadline)
        async with self._stack:
            try:
                await self._start()
                end = await self._life.end
            except Exception as error:
                self._life.finish(explain_failure(error))
                end = self._life.end.result()
            deadline.cancel()
            await self._tear_down(end)
        return 0 if end.expected else 1

    async def _start(self) -> None:
        self._write_record("starting")
        self._life.spawn(self._watch_parent())
        self._life.spawn(self._control.serve(self._listen_unix(Layout.CONTROL)))
        self._stack.push_async_callback(self._control.close)
        ready = self._open_ready(self._plan)
        self._stack.callback(ready.close)
        console_sock = self._open_console()
        restore = self._restore = self._begin_restore()
        qmp_sock, qmp_fd = socket.socketpair()
        # All children start side by side; what the parts will be plugged with is ready when QEMU is.
        with contextlib.ExitStack() as stack:
            descriptors = await self._fittings.open(self._vhost_fd, stack)
            with console_sock, qmp_fd:
                self._qemu = await self._start_qemu(console_sock.fileno(), qmp_fd.fileno(), ready.port)
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

    async def _tear_down(self, end: End) -> None:
        self._write_record("stopping")
        if self._qemu is not None:
            if end.reason in ("panic", "init-error"):
                # The rest of the trace explains more than its first line.
                await asyncio.wait([asyncio.ensure_future(self._qemu.wait())], timeout=TROUBLE_GRACE_S)
            await self._qemu.stop()
            if self._qmp is not None:
                await self._qmp.close()
            await self._drain_console()
        await self._fittings.stop()
        has_init_error = self._console is not None and self._console.init_error is not None
        is_kept = not end.expected or has_init_error
        kernel = await self._take_kernel_log() if is_kept else ""
        self._events.add("end", {"reason": end.reason, "brief": end.brief, "expected": end.expected})
        if is_kept:
            keep_evidence(self._plan.directory, self._plan.evidence, self._plan.companion_logs)
        console = self._console.tail(CONSOLE_LINES) if self._console is not None else ""
        details = render_details(end, console, kernel)
        if not self._life.is_ready:
            self._report(Report(Stage.FAILED, end.brief, details, end.hint, end.expected))
        # Written before it is announced: a client finds the record, also when the monitor no longer answers.
        write_ending(self._plan.directory, plan_ending(end, details, os.getpid(), time.time()))
        self._control.announce_end(Ended(end.reason, end.brief, end.expected))
        await self._life.cancel_all()
        self._events.close()
        discard(self._plan.directory)

    async def _take_kernel_log(self) -> str:
        """Puts the kernel's log beside the other logs, from the memory that QEMU has left; returns its last lines."""
        if self._qemu is None:
            return ""
        try:
            return await self._memory.take_tail(KERNEL_LINES)
        except (MachineError, OSError) as error:
            self._events.add("no-kernel-log", {"why": str(error)})
            return ""

    # ---- starting -------------------------------------------------------------------------------------------------

    def _listen_unix(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stack.callback(sock.close)
        path = self._plan.directory / name
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return sock

    def _open_console(self) -> socket.socket:
        ours, qemus = socket.socketpair()
        console = self._console = Console(ours, self._open_log(Layout.CONSOLE_LOG), self._on_trouble)
        self._stack.callback(console.close)
        self._console_task = self._life.spawn(console.read_to_end())
        self._life.spawn(console.listen(self._listen_unix(Layout.CONSOLE_SOCKET)))
        return qemus

    def _open_log(self, name: str) -> CappedLog:
        log = CappedLog(self._plan.directory / name)
        self._stack.callback(log.close)
        return log

    async def _start_qemu(self, console_fd: int, qmp_fd: int, ready_port: int) -> Child:
        with self._fittings.listen() as served:
            argv = self._plan.qemu.render_argv(
                console_fd=console_fd,
                qmp_fd=qmp_fd,
                memory_fd=self._memory.fd,
                ready_port=ready_port,
                served=served,
            )
            lines = [render_command(argv), ""]
            if self._plan.snapshot is None:
                lines[1:1] = [BY_HAND_NOTE, render_command(self._plan.qemu.render_by_hand())]
            with contextlib.suppress(OSError):
                text = "\n".join(lines)
                (self._plan.directory / Layout.ARGV).write_bytes(os.fsencode(text))
            log = self._open_log(Layout.QEMU_LOG)
            fds = (console_fd, qmp_fd, self._memory.fd, *served.values())
            qemu = await start_child("qemu", argv, log=log, pass_fds=fds, package=find_package(argv[0]))
        self._events.add("qemu-started", {"pid": qemu.pid})
        return qemu

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
        if not self._life.is_ready:
            self._life.finish(End("aborted", "vmkit up ended before the guest was ready", expected=True))

    async def _watch_qemu(self, qemu: Child) -> None:
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
        self._life.is_ready = True
        self._events.add("ready", {"wall": {}, **facts})
        self._report(Report(Stage.READY))
        if self._plan.snapshot is None or self._restore is not None:
            # One that will be saved must have no session.
            self._stack.push_async_callback(self._clock.close)
            self._life.spawn(self._clock.keep())

    def _begin_restore(self) -> "Restore | None":
        if self._plan.snapshot is None:
            return None
        from vmkit.monitor.snapshots import Restore  # noqa: PLC0415 - few machines are saved or restored

        restore = Restore(self._plan.snapshot, self._memory, self._plan.timeout_s)
        self._stack.push_async_callback(restore.close)
        return restore

    async def _thaw(self, restore: "Restore") -> None:
        thawed = await restore.thaw(self._find_guest(), self._plan.name)
        self._events.add("thawed", {"clock_error_ms": round(thawed.clock_error_ns / 1e6, 1)})
        self._become_ready(parse_wall_text(thawed.wall))

    async def _save(self, folder: Path) -> None:
        from vmkit.monitor.snapshots import save  # noqa: PLC0415 - few machines are saved or restored

        assert self._qmp is not None
        try:
            await save(folder, self._memory, self._qmp, self._fittings, self._find_guest(has_token=True))
        except OSError as error:
            text = f"cannot write the snapshot: {error.strerror or error}"
            raise MachineError(text, hint=find_remedy(error)) from error
        self._life.finish(End(SAVED, "the machine was saved", expected=True))

    def _find_guest(self, *, has_token: bool = False) -> "Address":
        """How to reach the guest, which need not be ready. has_token: it is told the machine's token, if any."""
        from vsh.address import address_of  # noqa: PLC0415 - a machine that ends within seconds is not asked

        token = self._plan.record.get("token") if has_token else None
        return address_of(Entry(str(self._plan.directory), {**self._plan.record, "state": "ready", "token": token}))

    def _open_clock(self) -> "GuestClock":
        from vsh.clock import open_clock  # noqa: PLC0415 - a machine that ends within seconds is not asked

        return open_clock(self._find_guest(has_token=True), timeout_s=CLOCK_DEADLINE_S)

    async def _drain_console(self) -> None:
        """What the guest printed last is read when QEMU's end of the console closes."""
        if self._console_task is not None:
            await asyncio.wait([self._console_task], timeout=CONSOLE_DRAIN_S)

    def _on_owner_gone(self, owner_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(owner_fd)
        self._life.finish(End("owner-gone", "the program that the machine belonged to has ended"))

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

    async def _on_control(self, request: Request) -> Answer:
        self._events.add("control", {"request": name_of(request), **asdict(request)})
        match request:
            case Watch():
                pass
            case ExpectEnd():
                self._life.is_asked = True
                self._write_record("stopping")
            case Save():
                # A save ends every session, so only a machine that its starter owns is saved.
                is_new = self._plan.is_owned and self._restore is None and not self._is_saving
                if not is_new or not self._life.is_ready:
                    return Answer(False, "this machine cannot be saved")
                self._is_saving = True
                self._life.spawn(self._save(Path(request.folder)))
            case Disown():
                self._adopt(0)
            case Quit():
                self._life.is_asked = True
                self._life.finish(End("killed", "stopped by the host", expected=True))
            case TakeKernelLog():
                try:
                    await self._memory.take_log()
                except MachineError as error:
                    return Answer(False, error.brief, error.hint)
                except OSError as error:
                    return Answer(False, f"cannot write the kernel's log: {error.strerror}", find_remedy(error))
            case Pause() | Resume() | MeasureClock() | Park() | Take():
                if not self._life.is_ready or self._qmp is None or self._life.is_asked or self._is_saving:
                    return Answer(False, f"'{self._plan.name}' is not ready")
                return await self._pausing.answer(request, self._qmp)
            case _:
                assert_never(request)
        return Answer(True)

    def _adopt(self, owner: int) -> None:
        """The machine ends with this process from here on, or with none. Raises OSError."""
        loop = asyncio.get_running_loop()
        new = os.pidfd_open(owner) if owner else None
        if self._owner_fd is not None:
            loop.remove_reader(self._owner_fd)
            os.close(self._owner_fd)
        self._owner_fd = new
        if new is not None:
            loop.add_reader(new, self._on_owner_gone, new)

    # ---- telling --------------------------------------------------------------------------------------------------

    def _report(self, report: Report) -> None:
        with contextlib.suppress(OSError):
            self._report_sock.settimeout(REPORT_DEADLINE_S)
            self._report_sock.sendall(report.render())
        self._report_sock.setblocking(False)

    def _write_record(self, state: str, *, must: bool = False) -> None:
        record = dict(self._plan.record, state="stopping" if self._life.is_asked else state, pid=os.getpid())
        if self._qemu is not None:
            record["qemu_pid"] = self._qemu.pid
        record |= self._facts
        if self._pausing.trouble:
            record["trouble"] = self._pausing.trouble
        # On a full disk the old record stays, and is still whole.
        with contextlib.nullcontext() if must else contextlib.suppress(OSError):
            write_record(self._plan.directory, record)
