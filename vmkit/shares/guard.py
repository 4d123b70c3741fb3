"""The process that keeps one virtiofsd: `python -m vmkit.shares.guard FD`, started by vmkit.shares.over_virtiofs.

It reads what to start as JSON from the socket FD, and sends back one line of JSON when virtiofsd serves. Then it takes
one connection of QEMU's, and stands between both. When virtiofsd ends, or the other end of FD is closed, it kills what
is left of virtiofsd, closes FD, and answers the guest's requests with errors until QEMU takes the device out.

A child of the process that was started does all of this. The parent is its deputy: it goes on when the child is killed
(vmkit.shares.deputy).
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmkit.shares.deputy import stand_by
from vmkit.shares.filter import PR_SET_PDEATHSIG, enter_filter, plan_filter
from vmkit.shares.notes import PID, Deputy, Note
from vmkit.shares.relay import DeviceRelay, RelayError, serve_errors, wait_for
from vshd.carry.inherited import settle_signals

MAX_REQUEST_BYTES: Final = 1 << 16
# In argv.
LISTENER_MARK: Final = "{listener}"
PR_SET_CHILD_SUBREAPER: Final = 36
TAIL_BYTES: Final = 4096
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class WantedServer:
    """argv: virtiofsd's, with LISTENER_MARK. socket: the path for QEMU's connection. uid, gid: who runs it."""

    argv: tuple[str, ...]
    socket: str
    uid: int
    gid: int

    @staticmethod
    def parse(record: Any) -> "WantedServer":
        """Raises KeyError, TypeError, ValueError."""
        words = tuple(str(word) for word in record["argv"])
        return WantedServer(words, str(record["socket"]), int(record["uid"]), int(record["gid"]))


class ServerProcess:
    """virtiofsd's processes. Invariant: all of them are in one process group, and become our children."""

    def __init__(self, wanted: WantedServer, deputy: Deputy) -> None:
        """Raises OSError, subprocess.SubprocessError."""
        _adopt()
        path = f"{wanted.socket}.d"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            try:
                listener.listen(1)
                # The first connection, and the only one.
                self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.connection.connect(path)
            finally:
                Path(path).unlink()
            reading, writing = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [word.replace(LISTENER_MARK, str(listener.fileno())) for word in wanted.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=writing,
                    stderr=writing,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,
                    cwd="/",
                    # This process has one thread.
                    preexec_fn=_confine(wanted),  # noqa: PLW1509
                )
            except BaseException:
                os.close(reading)
                raise
            finally:
                os.close(writing)
        os.set_blocking(reading, False)
        self.output = reading
        self._recent = b""
        self.pid = self._process.pid
        deputy.note(Note.SERVER, PID.pack(self.pid))
        self._deputy = deputy
        self._is_killed = False
        self.pidfd = os.pidfd_open(self.pid)

    def read_output(self) -> bool:
        """Keeps the last of what it prints; False at the end."""
        try:
            data = os.read(self.output, TAIL_BYTES)
        except BlockingIOError:
            return True
        self._recent = (self._recent + data)[-TAIL_BYTES:]
        return bool(data)

    def render_tail(self) -> str:
        """Its last lines."""
        while self.output in wait_for([self.output], 0.0) and self.read_output():
            pass
        return self._recent.decode(errors="replace").strip()

    def end(self) -> None:
        """Kills all of its processes, and sees them gone."""
        if self._is_killed:
            # The pid may be another's.
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._is_killed = True
        self._deputy.note(Note.KILLED)
        self._process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def _adopt() -> None:
    """virtiofsd's own child does the work, in another PID namespace. It becomes ours when its parent ends."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _become(wanted: WantedServer) -> None:
    """Gives up root's power for good. Raises OSError."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(wanted.gid, wanted.gid, wanted.gid)
        os.setresuid(wanted.uid, wanted.uid, wanted.uid)


def _confine(wanted: WantedServer) -> Callable[[], None]:
    """A preexec hook: the user, the filter, and no life after ours."""
    code = plan_filter()
    parent = os.getpid()

    def hook() -> None:
        _become(wanted)
        # A change of the user would clear it.
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(127)
        enter_filter(code)

    return hook


def main() -> int:
    """Guards one virtiofsd until QEMU has let go of its device."""
    settle_signals()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        # It ends when the device does.
        signal.signal(number, signal.SIG_IGN)
    # It has the guest's memory.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asker = socket.socket(fileno=int(sys.argv[1]))
    wanted = WantedServer.parse(json.loads(asker.makefile("rb").readline(MAX_REQUEST_BYTES)))
    # Before there is a child.
    _adopt()
    pidfd = os.pidfd_open(os.getpid())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    guard = os.fork()
    if guard == 0:
        theirs.close()
        return _start(asker, wanted, Deputy(ours, pidfd, (reading, writing)))
    # Its other end sees when the guard has ended.
    asker.close()
    ours.close()
    os.close(writing)
    os.close(pidfd)
    _become(wanted)
    return stand_by(guard, theirs, reading, wanted.socket)


def _start(asker: socket.socket, wanted: WantedServer, deputy: Deputy) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(wanted.socket)
            Path(wanted.socket).chmod(0o600)
            listener.listen(1)
            server = ServerProcess(wanted, deputy)
            _become(wanted)
        except (OSError, subprocess.SubprocessError) as error:
            _tell(asker, {"error": f"virtiofsd cannot be started: {error}"})
            return 1
        relay = DeviceRelay(server.connection, deputy)
        try:
            return _guard(asker, listener, server, relay)
        finally:
            server.end()
            relay.close()


def _guard(asker: socket.socket, listener: socket.socket, server: ServerProcess, relay: DeviceRelay) -> int:
    try:
        _await_start(server)
        relay.greet()
    except RelayError as error:
        server.end()
        _tell(asker, {"error": f"{error}", "details": server.render_tail()})
        return 1
    _tell(asker, {"pid": server.pid})
    ends = {asker.fileno(), server.pidfd}
    watched = [*ends, server.connection.fileno(), server.output]
    has_qemu = False
    try:
        while not relay.has_taken_over:
            ready = wait_for([*relay.list_waits(), *watched, *([] if has_qemu else [listener.fileno()])], None)
            if not has_qemu and listener.fileno() in ready:
                relay.connect(listener.accept()[0])
                has_qemu = True
            if server.output in ready and not server.read_output():
                ready.add(server.pidfd)
            if ends & ready or _has_ended(server.connection):
                server.end()
                relay.take_over()
                _tell(asker, {"ended": server.render_tail()})
                asker.close()
            relay.work()
    except EOFError:
        return 0
    except RelayError:
        return 1
    if has_qemu:
        return serve_errors(relay)
    # A share that was killed has left it. In a folder of root's it stays until the machine ends.
    with contextlib.suppress(OSError):
        Path(str(listener.getsockname())).unlink()
    return 0


def _await_start(server: ServerProcess) -> None:
    """A virtiofsd that cannot serve ends within a moment, and says why. Raises RelayError."""
    if server.pidfd in wait_for([server.pidfd], time.monotonic()):
        raise RelayError("virtiofsd has ended")


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other end is closed. What virtiofsd sends comes when it is asked."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _tell(asker: socket.socket, answer: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        asker.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
