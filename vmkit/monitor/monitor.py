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
from typing import TYPE_CHECKING, assert_never

from vmkit.errors import VmkitError
from vmkit.machine.argv import BY_HAND_NOTE
from vmkit.machine.launch import MAX_DETAILS_CHARACTERS, LaunchPlan, Layout, Report, Stage
from vmkit.machine.registry import discard, write_ending, write_record
from vmkit.machine.words import Answer, Ended, ExpectEnd, Quit, Request, Watch, name_of
from vmkit.monitor.child import Child, start_child
from vmkit.monitor.console import Console, ConsoleTrouble
from vmkit.monitor.control import ControlServer
from vmkit.monitor.end import End, QemuExit, explain_exit, explain_trouble
from vmkit.monitor.evidence import keep_evidence
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.life import Life, explain_failure
from vmkit.monitor.logs import CappedLog, EventLog
from vmkit.monitor.ready import ReadyListener, open_ready_listener, parse_wall
from vmkit.run import render_command

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp

CONSOLE_LINES = 15
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
        self._wall: dict[str, str] = {}
        self._console: Console | None = None
        self._console_task: asyncio.Task[None] | None = None
        self._fittings = Fittings(plan.qemu.fittings, self._life, self._events, self._listen_unix, self._open_log)
        self._qemu: Child | None = None
        self._qmp: Qmp | None = None

    # ---- the life -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """From nothing to cleaned up; the exit status is 0 when the end was expected."""
        loop = asyncio.get_running_loop()
        told = End("killed", "the monitor was told to stop", expected=True)
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
        qmp_sock, qmp_fd = socket.socketpair()
        # All children start side by side; what the parts will be plugged with is ready when QEMU is.
        with contextlib.ExitStack() as stack:
            descriptors = await self._fittings.open(self._vhost_fd, stack)
            with console_sock, qmp_fd:
                self._qemu = await self._start_qemu(console_sock.fileno(), qmp_fd.fileno(), ready.port)
            self._life.spawn(self._watch_qemu(self._qemu))
            self._report(Stage.STARTED)
            qmp = self._qmp = self._make_qmp()
            await self._life.or_end(qmp.connect(qmp_sock))
            self._life.spawn(qmp.listen(self._on_qmp_event))
            await self._fittings.plug(qmp, descriptors)
        self._life.spawn(self._watch_ready(ready))
        # Told before it is done: the guest may say READY before QEMU has answered.
        self._write_record("starting")
        self._report(Stage.RUNNING)
        await self._life.or_end(qmp.execute("cont"))

    async def _tear_down(self, end: End) -> None:
        self._write_record("stopping")
        if self._qemu is not None:
            if end.reason in ("panic", "init-error"):
                # The rest of the trace explains more than its first line.
                await asyncio.wait([asyncio.ensure_future(self._qemu.wait())], timeout=TROUBLE_GRACE_S)
            await self._qemu.stop()
            await self._drain_console()
        await self._fittings.stop()
        self._events.add("end", {"reason": end.reason, "brief": end.brief, "expected": end.expected})
        has_init_error = self._console is not None and self._console.init_error is not None
        if not end.expected or has_init_error:
            keep_evidence(self._plan.directory, self._plan.evidence, self._fittings.logs)
        details = self._render_details(end)
        if not self._life.is_ready:
            self._report(Stage.FAILED, end.brief, details, end.hint)
        # First left, then told: who hears it, or finds that there is nobody to hear it from, finds it there.
        write_ending(self._plan.directory, self._plan_ending(end, details))
        self._control.announce_end(Ended(end.reason, end.brief, end.expected))
        await self._life.cancel_all()
        self._events.close()
        discard(self._plan.directory)

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
                console_fd=console_fd, qmp_fd=qmp_fd, ready_port=ready_port, served=served
            )
            by_hand = render_command(self._plan.qemu.render_by_hand())
            with contextlib.suppress(OSError):
                text = "\n".join((render_command(argv), BY_HAND_NOTE, by_hand, ""))
                (self._plan.directory / Layout.ARGV).write_bytes(os.fsencode(text))
            log = self._open_log(Layout.QEMU_LOG)
            fds = (console_fd, qmp_fd, *served.values())
            qemu = await start_child("qemu", argv, log=log, pass_fds=fds, package="qemu-system-x86")
        self._events.add("qemu-started", {"pid": qemu.pid})
        return qemu

    def _make_qmp(self) -> "Qmp":
        # Imported here: it takes as long as QEMU's own start, and so costs nothing.
        from vmkit.monitor.qmp import Qmp  # noqa: PLC0415

        return Qmp(self._plan.name, self._open_log(Layout.QMP_LOG))

    # ---- watching -------------------------------------------------------------------------------------------------

    async def _watch_parent(self) -> None:
        """`up` gone, or saying anything, before READY means that nobody wants this machine any more."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_recv(self._report_sock, 1)
        if not self._life.is_ready:
            self._life.finish(End("aborted", "the start was interrupted", expected=True))

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
        self._wall = parse_wall(await listener.wait())
        listener.close()
        if self._life.end.done():
            # Too late: what is being torn down must not be called ready.
            return
        # Where this cannot be written, vsh would not find what `up` calls ready: that fails, then.
        self._write_record("ready", must=True)
        self._life.is_ready = True
        self._events.add("ready", {"wall": self._wall})
        self._report(Stage.READY)

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
            self._life.spawn(self._check_run_state())

    async def _check_run_state(self) -> None:
        """A guest that stops by itself has met an internal error of QEMU; one that is ending has not."""
        state = ""
        if self._qmp is not None:
            with contextlib.suppress(VmkitError):
                state = await self._qmp.query_run_state()
        if state == "internal-error" and self._qemu is not None:
            brief = "QEMU stopped the guest with an internal error"
            hint = "if this is KVM inside another VM, try --accel tcg"
            self._life.finish(End("internal-error", brief, details=self._qemu.render_tail(), hint=hint))

    def _on_control(self, request: Request) -> Answer:
        self._events.add("control", {"request": name_of(request), **asdict(request)})
        match request:
            case Watch():
                pass
            case ExpectEnd():
                self._life.is_asked = True
                self._write_record("stopping")
            case Quit():
                self._life.is_asked = True
                self._life.finish(End("killed", "stopped by the host", expected=True))
            case _:
                assert_never(request)
        return Answer(True)

    # ---- telling --------------------------------------------------------------------------------------------------

    def _report(self, stage: Stage, brief: str = "", details: str = "", hint: str = "") -> None:
        with contextlib.suppress(OSError):
            self._report_sock.settimeout(REPORT_DEADLINE_S)
            self._report_sock.sendall(Report(stage, brief, details, hint).render())
        self._report_sock.setblocking(False)

    def _render_details(self, end: End) -> str:
        parts = [end.details] if end.details else []
        console = self._console.tail(CONSOLE_LINES) if self._console is not None else ""
        if console and not end.expected:
            parts.append("the console's last lines:\n" + console)
        return "\n".join(parts)

    def _plan_ending(self, end: End, details: str) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "at": round(time.time(), 3),
            "end": end.reason,
            "brief": end.brief,
            "expected": end.expected,
            "details": details[-MAX_DETAILS_CHARACTERS:],
            "hint": end.hint,
        }

    def _write_record(self, state: str, *, must: bool = False) -> None:
        record = dict(self._plan.record, state="stopping" if self._life.is_asked else state, pid=os.getpid())
        if self._qemu is not None:
            record["qemu_pid"] = self._qemu.pid
        if self._wall:
            record["wall"] = self._wall
        # On a full disk the old record stays, and is still whole.
        with contextlib.nullcontext() if must else contextlib.suppress(OSError):
            write_record(self._plan.directory, record)
