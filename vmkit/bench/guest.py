"""One guest, two ways to run a command in it from Python, each a vsh.executor.Executor: vsh's client, and paramiko."""

import os
import shlex
import time
from collections.abc import Sequence

from vmkit.bench.sinks import plan_source
from vmkit.errors import HostError
from vmkit.ssh.access import DEFAULT_PORT, Access
from vsh.address import Address
from vsh.client import Client, Result
from vsh.executor import Executor
from vsh.forward.guest import connect_guest
from vsh.memory import BytesSource
from vsh.pump import Pump, Sink
from vshd.wire import messages

CONNECT_TIMEOUT_S = 60.0
BULK_TIMEOUT_S = 300.0


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
        """Seconds of a session that is given `data`; raises HostError unless it says `wanted` bytes and ends well."""
        sink = _Counter()
        started_s = time.perf_counter()
        with self.open_session(argv) as session:
            end = Pump(session, BytesSource(data), {messages.STDOUT: sink}).run(time.monotonic() + BULK_TIMEOUT_S)
        taken_s = time.perf_counter() - started_s
        if (end.code, sink.size) != (0, wanted):
            raise HostError(f"'{argv[0]}' in the guest: status {end.code}, {sink.size} bytes of {wanted}")
        return taken_s


class _Counter(Sink):
    """Keeps nothing but the size."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, pieces: list[memoryview | bytes]) -> int:
        size = sum(map(len, pieces))
        self.size += size
        return size


class ParamikoGuest:
    """paramiko on one ssh connection, which stays open; each command is a channel of it."""

    def __init__(self, address: Address, access: Access) -> None:
        """Raises HostError when paramiko is not installed."""
        try:
            import paramiko  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
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
        output, errors = bytes(stdout.read()), bytes(stderr.read())
        status = int(stdout.channel.recv_exit_status())
        return Result(list(argv), output, errors, status, 0)

    def push(self, source: str, destination: str) -> None:
        """A file; SFTP has no word for a tree."""
        with self._client.open_sftp() as sftp:
            sftp.put(source, destination)

    def pull(self, source: str, destination: str) -> None:
        """A file; SFTP has no word for a tree."""
        with self._client.open_sftp() as sftp:
            sftp.get(source, destination)

    def exists(self, path: str) -> bool:
        """Whether the guest has something at this path."""
        return self.run(["sh", "-c", 'test -e "$1" || test -L "$1"', "sh", path]).exit == 0

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
