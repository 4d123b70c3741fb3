"""The one process that owns a machine: QEMU's parent, the ready listener, the logs, the control socket, the clean-up.

Started by vmkit.machine.start with a LaunchPlan; lives as long as its QEMU. When it is killed, the kernel kills QEMU
and the device with it (PR_SET_PDEATHSIG), and its lock on the machine's directory falls, so that the next `up` sweeps
what is left.

Life: bind every socket -> start the device -> start QEMU paused -> take it over (QMP) -> plug the device -> run ->
READY -> ... -> end -> clean up. Whatever happens first decides: every watcher calls `_finish`, and the first End
wins.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, BinaryIO, cast

from vmkit.errors import VmkitError
from vmkit.machine.child import Child, start_child
from vmkit.machine.console import Console, ConsoleTrouble
from vmkit.machine.control import ControlServer
from vmkit.machine.end import End, QemuExit, explain_exit, explain_trouble
from vmkit.machine.handover import receive_plan
from vmkit.machine.launch import LaunchPlan, Layout, Report, Stage
from vmkit.machine.logs import CappedLog, EventLog
from vmkit.machine.qemu import USER_READY_PORT, VSOCK_CHARDEV_ID
from vmkit.machine.ready import ReadyListener, open_ready_listener
from vmkit.machine.registry import discard, write_record
from vmkit.machine.spec import Backend
from vmkit.run import render_command

if TYPE_CHECKING:
    from vmkit.machine.qmp import Qmp

CONSOLE_LINES = 15
# A panicking kernel prints its trace after the first line, then resets; what has not come by then is not waited for.
TROUBLE_GRACE_S = 1.5
CONSOLE_DRAIN_S = 1.0
BACKLOG = 64
# A device process that dies is replaced; one that keeps dying is a fault worth ending the machine for.
MAX_DEVICE_RESTARTS = 3
UNPLUG_DEADLINE_S = 10.0
# Events of QEMU that say nothing about a machine's fate and come in floods.
_QUIET_EVENTS = frozenset({"RTC_CHANGE", "NIC_RX_FILTER_CHANGED", "VSERPORT_CHANGE"})


class Monitor:
    """One machine's life. Invariant: `_end` is set once, and everything that was opened is on `_stack`."""

    def __init__(self, plan: LaunchPlan, report_sock: socket.socket, vhost_fd: int | None) -> None:
        self._plan = plan
        self._report_sock = report_sock
        self._vhost_fd = vhost_fd
        self._end: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._stack = contextlib.AsyncExitStack()
        self._events = EventLog(plan.directory / Layout.EVENTS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = False
        self._asked = False
        self._shutdown_reason = ""
        self._device_restarts = 0
        self._console: Console
        self._qemu: Child
        self._qmp: Qmp
        self._control: ControlServer
        self._console_task: asyncio.Task[None]
        self._vsock_listener: socket.socket | None = None

    # ---- the life -------------------------------------------------------------------------------------------------

    async def run(self) -> int:
        """From nothing to cleaned up; the exit status is 0 when the end was expected."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._finish, End("killed", "the monitor was told to stop", expected=True))
        async with self._stack:
            try:
                await self._start()
                deadline = loop.call_later(self._plan.timeout_s, self._on_deadline)
                end = await self._end
                deadline.cancel()
            except VmkitError as error:
                end = End("start-failed", error.brief, details=error.details, hint=error.hint)
                if self._end.done() and not self._end.result().expected:
                    end = self._end.result()
            await self._tear_down(end)
        return 0 if end.expected else 1

    async def _start(self) -> None:
        self._spawn(self._watch_parent())
        self._bind()
        ready = open_ready_listener(self._plan)
        self._stack.callback(ready.close)
        console_sock = self._open_console()
        qmp_sock, qmp_fd = socket.socketpair()
        # Both children start side by side; what the device will be plugged with is ready when QEMU is.
        with await self._open_vsock() as vsock:
            with console_sock, qmp_fd:
                await self._start_qemu(console_sock.fileno(), qmp_fd.fileno(), ready.port)
            self._spawn(self._watch_qemu())
            self._report(Stage.STARTED)
            self._qmp = self._make_qmp()
            await self._or_end(self._qmp.connect(qmp_sock))
            self._spawn_task(self._qmp.listen(self._on_qmp_event))
            await self._or_end(self._qmp.plug(self._plan.qemu.plug, vsock.fileno()))
        self._spawn(self._watch_ready(ready))
        # Told before it is done: the guest may say READY before QEMU has answered.
        self._write_record("starting")
        self._report(Stage.RUNNING)
        await self._or_end(self._qmp.execute("cont"))

    async def _or_end(self, work: Coroutine[None, None, object]) -> None:
        """Awaits a step of the start, unless the end comes first (QEMU exits, `up` goes away)."""
        task = asyncio.ensure_future(work)
        both: set[asyncio.Future[object]] = {task, cast("asyncio.Future[object]", self._end)}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if self._end.done():
            # QEMU's exit makes QMP fail too; its exit is the cause, the broken QMP only a consequence.
            task.cancel()
            await asyncio.wait({task})
            end = self._end.result()
            raise VmkitError(end.brief, details=end.details, hint=end.hint)
        if task.exception() is not None:
            # The other way round: give QEMU's exit the moment it needs to be seen.
            await asyncio.wait({self._end}, timeout=CONSOLE_DRAIN_S)
            if self._end.done():
                end = self._end.result()
                raise VmkitError(end.brief, details=end.details, hint=end.hint)
            await task

    async def _tear_down(self, end: End) -> None:
        self._write_record("stopping")
        if hasattr(self, "_qemu"):
            if end.reason in ("panic", "init-error"):
                # The rest of the trace explains more than its first line.
                await asyncio.wait([asyncio.ensure_future(self._qemu.wait())], timeout=TROUBLE_GRACE_S)
            await self._qemu.stop()
            await asyncio.wait([self._console_task], timeout=CONSOLE_DRAIN_S)
        details = self._render_details(end)
        self._events.add("end", {"reason": end.reason, "brief": end.brief, "expected": end.expected})
        if not end.expected:
            self._keep_evidence()
        if self._ready:
            self._control.announce_end(end)
        else:
            self._report(Stage.FAILED, end.brief, details, end.hint)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._events.close()
        discard(self._plan.directory)

    # ---- starting -------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        self._control = ControlServer(self._plan, self._on_control)
        self._stack.push_async_callback(self._control.close)
        self._spawn(self._control.serve(self._listen_unix(Layout.CONTROL)))
        if self._plan.backend is Backend.USER:
            self._vsock_listener = self._listen_unix(Layout.VSOCK)

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
        self._console = Console(ours, self._open_log(Layout.CONSOLE_LOG), self._on_trouble)
        self._stack.callback(self._console.close)
        self._console_task = self._spawn(self._console.read_to_end())
        self._spawn(_serve_console(self._console, self._listen_unix(Layout.CONSOLE_SOCKET)))
        return qemus

    def _open_log(self, name: str) -> CappedLog:
        log = CappedLog(self._plan.directory / name)
        self._stack.callback(log.close)
        return log

    async def _start_qemu(self, console_fd: int, qmp_fd: int, ready_port: int) -> None:
        argv = self._plan.qemu.render_argv(console_fd=console_fd, qmp_fd=qmp_fd, ready_port=ready_port)
        (self._plan.directory / Layout.ARGV).write_text(render_command(argv) + "\n")
        self._qemu = await start_child(
            "qemu",
            argv,
            log=self._open_log(Layout.QEMU_LOG),
            pass_fds=(console_fd, qmp_fd),
            package="qemu-system-x86",
        )
        self._events.add("qemu-started", {"pid": self._qemu.pid})

    def _make_qmp(self) -> "Qmp":
        # Imported here: it takes as long as QEMU's own start, and so costs nothing.
        from vmkit.machine.qmp import Qmp  # noqa: PLC0415

        return Qmp(self._plan.name, self._open_log(Layout.QMP_LOG))

    async def _open_vsock(self) -> socket.socket | BinaryIO:
        """QEMU's end of the vsock device: the vhost descriptor, or a connection to a device process started now."""
        if self._plan.backend is Backend.VHOST:
            if self._vhost_fd is None:
                raise VmkitError("the vhost backend was chosen, but no descriptor of it was given")
            return os.fdopen(self._vhost_fd, "r+b", buffering=0)
        device_sock, qemu_sock = socket.socketpair()
        with device_sock:
            await self._start_device(device_sock)
        return qemu_sock

    async def _start_device(self, device_sock: socket.socket) -> None:
        listener = self._vsock_listener
        if listener is None:
            raise VmkitError("the user backend has no socket")
        argv = [
            sys.executable, "-P", "-m", "vmkit.vsock",
            "--guest-cid", str(self._plan.cid),
            "--vhost-user-fd", str(device_sock.fileno()),
            "--listen-fd", str(listener.fileno()),
            "--uds-path", str(self._plan.directory / Layout.VSOCK),
            "--privileged-port", str(USER_READY_PORT),
        ]  # fmt: skip
        device = await start_child(
            "vsock device",
            argv,
            log=self._open_log(Layout.DEVICE_LOG),
            pass_fds=(device_sock.fileno(), listener.fileno()),
        )
        self._events.add("device-started", {"pid": device.pid})
        self._spawn(self._watch_device(device))

    # ---- watching -------------------------------------------------------------------------------------------------

    async def _watch_parent(self) -> None:
        """`up` gone, or saying anything, before READY means that nobody wants this machine any more."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            await loop.sock_recv(self._report_sock, 1)
        if not self._ready:
            self._finish(End("aborted", "the start was interrupted", expected=True))

    async def _watch_qemu(self) -> None:
        status = await self._qemu.wait()
        await asyncio.wait([self._console_task], timeout=CONSOLE_DRAIN_S)
        seen = QemuExit(self._qemu.render_end(), status, self._shutdown_reason, self._qemu.render_tail())
        trouble = None if self._ready and self._shutdown_reason == "guest-shutdown" else self._console.trouble
        self._finish(explain_exit(seen, trouble, ready=self._ready, asked=self._asked))

    async def _watch_device(self, device: Child) -> None:
        await device.wait()
        self._events.add("device-ended", {"how": device.render_end()})
        # QEMU's end closes the device's connection, and that ends the device: see first whether it was that.
        await asyncio.wait({self._end}, timeout=CONSOLE_DRAIN_S)
        if self._end.done():
            return
        if self._device_restarts >= MAX_DEVICE_RESTARTS or not self._ready:
            how = f"the vsock device ended with {device.render_end()}"
            self._finish(End("device-exit", how, details=device.render_tail()))
            return
        self._device_restarts += 1
        try:
            await self._qmp.unplug(UNPLUG_DEADLINE_S)
            await self._qmp.execute("chardev-remove", {"id": VSOCK_CHARDEV_ID})
            with await self._open_vsock() as vsock:
                await self._qmp.plug(self._plan.qemu.plug, vsock.fileno())
            self._events.add("device-replaced")
        except (VmkitError, TimeoutError) as error:
            self._finish(End("device-exit", "the vsock device ended and could not be replaced", details=str(error)))

    async def _watch_ready(self, listener: ReadyListener) -> None:
        try:
            await listener.wait()
        except VmkitError as error:
            self._finish(End("bad-ready", error.brief, details=error.details))
            return
        self._ready = True
        self._events.add("ready")
        self._write_record("ready")
        self._report(Stage.READY)

    def _on_deadline(self) -> None:
        if not self._ready:
            self._finish(
                End(
                    "timeout",
                    f"the guest was not ready within {self._plan.timeout_s:g} s",
                    hint="give it longer with --timeout, or watch it boot with --console",
                )
            )

    def _on_trouble(self, trouble: ConsoleTrouble) -> None:
        self._events.add(trouble.kind, {"text": trouble.text})
        if not self._ready:
            self._finish(explain_trouble(trouble))

    def _on_qmp_event(self, name: str, data: Mapping[str, object]) -> None:
        if name in _QUIET_EVENTS:
            return
        self._events.add(name.lower(), {"data": dict(data)} if data else None)
        if name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))
        elif name == "STOP":
            self._spawn(self._check_run_state())

    async def _check_run_state(self) -> None:
        with contextlib.suppress(VmkitError):
            state = await self._qmp.query_run_state()
            if state == "internal-error":
                self._finish(
                    End(
                        "internal-error",
                        "QEMU stopped the guest with an internal error",
                        details=self._qemu.render_tail(),
                        hint="if this is KVM inside another VM, try --accel tcg",
                    )
                )

    def _on_control(self, verb: str) -> None:
        self._events.add("control", {"verb": verb})
        match verb:
            case "stopping":
                self._asked = True
                self._write_record("stopping")
            case "quit" | "kill":
                self._asked = True
                self._finish(End("killed", "stopped by the host", expected=True))

    # ---- telling --------------------------------------------------------------------------------------------------

    def _finish(self, end: End) -> None:
        if not self._end.done():
            self._end.set_result(end)

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        return self._spawn_task(asyncio.create_task(work))

    def _spawn_task(self, task: "asyncio.Task[None]") -> "asyncio.Task[None]":
        self._tasks.add(task)
        return task

    def _report(self, stage: Stage, brief: str = "", details: str = "", hint: str = "") -> None:
        with contextlib.suppress(OSError):
            self._report_sock.setblocking(True)
            self._report_sock.settimeout(CONSOLE_DRAIN_S)
            self._report_sock.sendall(Report(stage, brief, details, hint).render())
            self._report_sock.setblocking(False)

    def _render_details(self, end: End) -> str:
        parts = [end.details] if end.details else []
        console = self._console.tail(CONSOLE_LINES) if hasattr(self, "_console") else ""
        if console and not end.expected:
            parts.append("the console's last lines:\n" + console)
        return "\n".join(parts)

    def _write_record(self, state: str) -> None:
        record = dict(self._plan.record, state=state, pid=os.getpid())
        if hasattr(self, "_qemu"):
            record["qemu_pid"] = self._qemu.pid
        with contextlib.suppress(OSError):
            write_record(self._plan.directory, record)

    def _keep_evidence(self) -> None:
        """The logs of a machine that ended badly, one set per name, for `vmkit logs` and bug reports."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self._plan.evidence, ignore_errors=True)
            self._plan.evidence.mkdir(parents=True, mode=0o700)
            for name in Layout.LOGS:
                source = self._plan.directory / name
                if source.exists():
                    shutil.copyfile(source, self._plan.evidence / name)


async def _serve_console(console: Console, listener: socket.socket) -> None:
    server = await asyncio.start_unix_server(console.serve, sock=listener)
    async with server:
        await server.serve_forever()


def main(argv: list[str]) -> int:
    """`python -m vmkit.machine.monitor FD`: waits on the socket FD for a plan, then owns the machine."""
    os.umask(0o077)
    received = receive_plan(int(argv[0]))
    if received is None:
        return 0
    with (received.plan.directory / Layout.MONITOR_LOG).open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    received.reports.setblocking(False)

    async def run() -> int:
        return await Monitor(received.plan, received.reports, received.vhost_fd).run()

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
