"""One guest, and the ways to run a command in it from Python: vsh's client, ssh, paramiko. Each is an Executor."""

import os
import selectors
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from subprocess import TimeoutExpired
from typing import IO

from vmkit.bench.programs import Popen, start_program
from vmkit.bench.sinks import plan_source
from vmkit.errors import HostError
from vmkit.ssh.access import DEFAULT_PORT, Access
from vsh import archive
from vsh.address import Address
from vsh.client import EXISTS, OUTPUT_LIMIT_BYTES, Client, Result
from vsh.errors import ConnectionLost, Unanswered, VshError
from vsh.executor import Executor
from vsh.forward.guest import connect_guest
from vsh.memory import BytesSource, CaptureSink
from vsh.process import DEVNULL, PIPE
from vsh.pump import Pump, Sink
from vshd.wire import messages

CONNECT_TIMEOUT_S = 60.0
BULK_TIMEOUT_S = 300.0
# Of a whole copy by push or pull.
COPY_TIMEOUT_S = 300.0
READ_BYTES = 1 << 18
# ssh(1): the status of ssh itself.
SSH_FAILED = 255


class VshGuest(Client):
    """vsh's Python API: each command has a connection of its own."""

    def __init__(self, address: Address) -> None:
        super().__init__(address, timeout_s=CONNECT_TIMEOUT_S)

    def time_bulk(self, way: str, size: int) -> float:
        """Seconds of a session that brings `size` bytes out, or takes them in. Raises HostError when it does not."""
        if way == "out":
            return self.time_session(plan_source(size), b"", size)
        return self.time_session(["sh", "-c", "cat >/dev/null"], bytes(size), 0)

    def time_session(self, argv: list[str], data: bytes, wanted: int) -> float:
        """Seconds of a session that is given `data`; HostError unless it prints `wanted` bytes and exits with 0."""
        sink = _Counter()
        started_s = time.perf_counter()
        with self.open_session(argv) as session:
            end = Pump(session, BytesSource(data), {messages.STDOUT: sink}).run(time.monotonic() + BULK_TIMEOUT_S)
        taken_s = time.perf_counter() - started_s
        if (end.code, sink.size) != (0, wanted):
            raise HostError(f"'{argv[0]}' in the guest: status {end.code}, {sink.size} bytes of {wanted}")
        return taken_s


class _Counter(Sink):
    """Keeps only the size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, pieces: list[memoryview | bytes]) -> int:
        size = sum(map(len, pieces))
        self.size += size
        return size


class SshGuest:
    """The program ssh: each command is a connection of its own, or a channel of a ControlMaster that runs."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        timeout_s: float = CONNECT_TIMEOUT_S,
        copy_timeout_s: float = COPY_TIMEOUT_S,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> None:
        """words: ssh, its options, and the host last. timeout_s: of a command; copy_timeout_s: of a push or a pull.

        output_limit_bytes: of each output of a command.
        """
        self._words = tuple(words)
        self._timeout_s = timeout_s
        self._copy_timeout_s = copy_timeout_s
        self._output_limit_bytes = output_limit_bytes

    def popen(self, argv: Sequence[str], *, stdin: int = PIPE, stdout: int = PIPE, user: str = "") -> Popen:
        """A command that runs, by way of the login shell, as ssh has it. user: ssh's own `-l`."""
        login = ("-l", user) if user else ()
        return start_program([*self._words[:-1], *login, self._words[-1], shlex.join(argv)], stdin=stdin, stdout=stdout)

    def run(self, argv: Sequence[str | bytes]) -> Result[bytes]:
        """A command to its end. ssh's status 255 is a lost connection, and raises ConnectionLost.

        Raises Unanswered when time is over, and VshError when an output is larger than the limit.
        """
        with self.popen([os.fsdecode(word) for word in argv], stdin=DEVNULL) as process:
            try:
                output, errors = _capture(process, self._timeout_s, self._output_limit_bytes)
            except BaseException:
                process.kill()
                raise
        if process.returncode == SSH_FAILED:
            raise ConnectionLost("ssh failed", details=errors.decode(errors="replace"))
        return Result(list(argv), output, errors, process.returncode, 0)

    def push(self, source: str, destination: str) -> None:
        """A file or a directory, as a tar stream. Raises Unanswered when time is over."""
        self._copy(archive.push, source, destination)

    def pull(self, source: str, destination: str) -> None:
        """A file or a directory, as a tar stream. Raises Unanswered when time is over."""
        self._copy(archive.pull, source, destination)

    def _copy(self, copy: Callable[[archive.CommandStarter, str, str], None], source: str, destination: str) -> None:
        opener = _LimitedOpener(self, self._copy_timeout_s)
        try:
            copy(opener, source, destination)
        except VshError as error:
            if opener.is_over:
                raise Unanswered(f"ssh did not copy {source} within {self._copy_timeout_s:g} s") from error
            raise
        finally:
            opener.close()

    def exists(self, path: str) -> bool:
        """Whether the guest has something at this path."""
        return self.run([*EXISTS, path]).exit == 0

    def close(self) -> None:
        """Does nothing: no connection is open between commands."""


class _LimitedOpener:
    """Starts the one ssh of a copy, and kills it when time is over: that ends each read and write of its pipes."""

    def __init__(self, guest: SshGuest, timeout_s: float) -> None:
        self.is_over = False
        self._guest = guest
        self._process: Popen | None = None
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def popen(self, argv: Sequence[str], *, stdin: int, stdout: int, user: str) -> Popen:
        self._process = self._guest.popen(argv, stdin=stdin, stdout=stdout, user=user)
        self._timer.start()
        return self._process

    def close(self) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        assert self._process is not None
        self.is_over = True
        self._process.kill()


def _capture(process: Popen, timeout_s: float, limit_bytes: int) -> tuple[bytes, bytes]:
    """Both outputs of a process that then has ended. Raises Unanswered, and VshError for an output beyond the limit."""
    deadline_s = time.monotonic() + timeout_s
    assert process.stdout is not None and process.stderr is not None
    output, errors = CaptureSink(limit_bytes), CaptureSink(limit_bytes)
    late = Unanswered(f"ssh did not end within {timeout_s:g} s")
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        while selector.get_map():
            remaining_s = deadline_s - time.monotonic()
            # A program that prints for ever is always ready.
            ready = selector.select(remaining_s) if remaining_s > 0 else []
            if not ready:
                raise late
            for key, _ in ready:
                data = os.read(key.fd, READ_BYTES)
                if data:
                    key.data.write([data])
                else:
                    selector.unregister(key.fileobj)
    try:
        process.wait(max(0.0, deadline_s - time.monotonic()))
    except TimeoutExpired as error:
        raise late from error
    return output.take(), errors.take()


def _read_limited(stream: IO[bytes]) -> bytes:
    """Raises VshError for an output beyond the limit."""
    sink = CaptureSink(OUTPUT_LIMIT_BYTES)
    while data := stream.read(READ_BYTES):
        sink.write([data])
    return sink.take()


class ParamikoGuest:
    """paramiko on one ssh connection, which stays open; each command is a channel of it."""

    def __init__(self, address: Address, access: Access) -> None:
        """Raises HostError when paramiko is not installed."""
        try:
            import paramiko  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise HostError("paramiko is not installed", hint="pip install 'vmkit-vsh[bench]'") from error
        import socket  # noqa: PLC0415

        fd, _ = connect_guest(address, f"vsock:{DEFAULT_PORT}", timeout_s=CONNECT_TIMEOUT_S)
        self._socket = socket.socket(fileno=fd)
        self._socket.settimeout(CONNECT_TIMEOUT_S)
        self._client = paramiko.SSHClient()
        self._client.load_host_keys(str(access.known_hosts))
        self._client.connect(
            access.machine,
            username=access.user,
            key_filename=str(access.key),
            sock=self._socket,
            look_for_keys=False,
            allow_agent=False,
            timeout=CONNECT_TIMEOUT_S,
        )

    def run(self, argv: Sequence[str | bytes]) -> Result[bytes]:
        """A command by way of the user's login shell, as ssh has it."""
        words = [os.fsdecode(word) for word in argv]
        _, stdout, stderr = self._client.exec_command(shlex.join(words), timeout=CONNECT_TIMEOUT_S)
        output, errors = _read_limited(stdout), _read_limited(stderr)
        status = int(stdout.channel.recv_exit_status())
        return Result(list(argv), output, errors, status, 0)

    def push(self, source: str, destination: str) -> None:
        """A file; SFTP has no word for a tree."""
        with self._client.open_sftp() as sftp:
            sftp.get_channel().settimeout(CONNECT_TIMEOUT_S)
            sftp.put(source, destination)

    def pull(self, source: str, destination: str) -> None:
        """A file; SFTP has no word for a tree."""
        with self._client.open_sftp() as sftp:
            sftp.get_channel().settimeout(CONNECT_TIMEOUT_S)
            sftp.get(source, destination)

    def exists(self, path: str) -> bool:
        """Whether the guest has something at this path."""
        return self.run([*EXISTS, path]).exit == 0

    def close(self) -> None:
        """Closes the ssh connection."""
        self._client.close()


def time_command(guest: Executor, argv: list[str]) -> float:
    """Seconds of one command. Raises HostError when it fails."""
    started_s = time.perf_counter()
    status = guest.run(argv).exit
    taken_s = time.perf_counter() - started_s
    if status != 0:
        raise HostError(f"'{argv[0]}' failed in the guest with status {status}")
    return taken_s
