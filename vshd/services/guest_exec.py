"""vsock_guest_exec's mode: this program connects to the host, and runs the commands that the host sends.

It needs no server, no token and no file but /bin/sh, so an initramfs can use it before anything else runs. The guest
chooses the host by connecting, and the commands run as the user of this process. Their output goes where this
process's goes; nothing is sent back but the end of the connection.
"""

import _socket
import os
import select
import time

from vshd.carry import vsock
from vshd.flags import Options
from vshd.log import Log, fit
from vshd.processes import end_session, find_exit, reap
from vshd.root import open_root
from vshd.signals import SIGCHLD, SIGINT, SIGTERM, Wakeup, find_ignored
from vshd.wire.commands import COMMAND_BYTES_MAX, BadCommandError, CommandReader, check_command, parse_host

SHELL = "/bin/sh"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_STARTED = 127
BY_SIGNAL = 128
COMMAND_SHOWN_MAX = 200


class GivenUpError(Exception):
    """The host sent no command in time, or a signal asks this process to end. status: the exit status."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def run_commands(options: Options, log: Log) -> int:
    """Connects, and runs what the host sends; returns the exit status. Raises OSError, VsockError."""
    root = open_root(options.root_namespace)
    fd, place = connect(options.exec_from)
    if root is not None:
        root.enter()
    runner = CommandRunner(fd, place, log, Wakeup((SIGCHLD, SIGTERM, SIGINT)), options.handshake_timeout)
    try:
        return runner.run_all() if options.persistent else runner.run_one()
    except (GivenUpError, BadCommandError) as error:
        log.error(f"{place}: {error}")
        return error.status if isinstance(error, GivenUpError) else 1
    finally:
        os.close(fd)


def connect(where: str) -> tuple[int, str]:
    """A connection to the host `CID:PORT`, or to `unix:PATH`, and its name. Raises OSError, VsockError."""
    kind, _, path = where.partition(":")
    if kind == "unix" and path:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise OSError(error.errno, f"cannot connect to {where}: {error.strerror}") from error
        place = where
    else:
        cid, port = parse_host(where)
        connection = vsock.connect(cid, port)
        place = f"vsock {cid}:{port}"
    connection.setblocking(False)
    return connection.detach(), place


class CommandRunner:
    """The commands of one connection, one after another."""

    def __init__(self, fd: int, place: str, log: Log, wakeup: Wakeup, patience_s: int) -> None:
        """patience_s: how long the host may take for a command that it must send, or has begun to send."""
        self._fd = fd
        self._place = place
        self._log = log
        self._wakeup = wakeup
        self._patience_s = patience_s

    def run_one(self) -> int:
        """Runs one command, and returns its status. Raises GivenUpError, BadCommandError."""
        deadline_s = time.monotonic() + self._patience_s
        command = self._receive(deadline_s, COMMAND_BYTES_MAX + 1)
        if not command:
            raise GivenUpError("the host left and sent no command")
        # The host sends a command in one piece, which the transport may cut.
        while len(command) <= COMMAND_BYTES_MAX:
            try:
                more = os.read(self._fd, COMMAND_BYTES_MAX + 1 - len(command))
            except OSError:
                break
            if not more:
                break
            command += more
        check_command(command)
        return self._run(command)

    def run_all(self) -> int:
        """Runs commands until the host leaves. Raises GivenUpError, BadCommandError."""
        reader = CommandReader()
        while True:
            deadline_s = None if reader.is_between else time.monotonic() + self._patience_s
            data = self._receive(deadline_s, COMMAND_BYTES_MAX)
            if not data:
                if not reader.is_between:
                    raise GivenUpError("the host left within a command")
                return 0
            for command in reader.receive_data(data):
                self._run(command)

    def _receive(self, deadline_s: float | None, size: int) -> bytes:
        """What the host sends next; nothing when it has left. Raises GivenUpError."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wakeup.fd, select.POLLIN)
        while True:
            left_ms = None if deadline_s is None else max(0.0, deadline_s - time.monotonic()) * 1000
            ready = [fd for fd, _ in poll.poll(left_ms)]
            self._obey_signals()
            if not ready and deadline_s is not None and time.monotonic() >= deadline_s:
                raise GivenUpError(f"the host sent no whole command within {self._patience_s} s")
            if self._fd in ready:
                try:
                    return os.read(self._fd, size)
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise GivenUpError(f"the connection broke: {error.strerror}") from error

    def _obey_signals(self) -> None:
        for number in self._wakeup.take():
            if number in (SIGTERM, SIGINT):
                raise GivenUpError("ended by a signal", BY_SIGNAL + number)

    def _run(self, command: bytes) -> int:
        """Runs one command to its end, and returns its status. Raises GivenUpError, and then the command has ended."""
        shown = fit(os.fsdecode(command), COMMAND_SHOWN_MAX)
        started_s = time.monotonic()
        try:
            pid = self._start(command)
        except OSError as error:
            self._log.error(f"{self._place}: {shown}: cannot start {SHELL}: {error.strerror}")
            return NOT_STARTED
        poll = select.poll()
        poll.register(self._wakeup.fd, select.POLLIN)
        try:
            while (end := find_exit(pid)) is None:
                poll.poll()
                self._obey_signals()
        except GivenUpError:
            end_session(pid, has_terminal=False)
            raise
        finally:
            reap(pid)
        self._log.info(f"{self._place}: {shown}: {end} after {time.monotonic() - started_s:.3f} s")
        return BY_SIGNAL + end.signal if end.signal else end.code

    def _start(self, command: bytes) -> int:
        """The shell's pid: it leads a session, and its input is empty."""
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.posix_spawn(
                SHELL,
                [b"sh", b"-c", command],
                {"PATH": PATH, **os.environ},
                file_actions=[(os.POSIX_SPAWN_DUP2, null, 0)],
                setsid=True,
                setsigmask=(),
                setsigdef=find_ignored(),
            )
        finally:
            os.close(null)
