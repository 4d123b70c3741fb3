"""One guest, two ways to run a command in it from Python: vsh's client, and paramiko over the same vsock."""

import time
from typing import Protocol

from vmkit.bench.sinks import plan_source
from vmkit.errors import HostError
from vmkit.ssh.access import DEFAULT_PORT, Access
from vsh.address import Address
from vsh.client import Client
from vsh.forward.guest import connect_guest
from vsh.memory import BytesSource
from vsh.pump import Pump, Sink
from vshd.wire import messages

CONNECT_TIMEOUT_S = 60.0
BULK_TIMEOUT_S = 300.0


class Guest(Protocol):
    """Runs commands; whoever uses it does not know how."""

    def run(self, argv: list[str]) -> tuple[int, bytes]:
        """A command's exit status and stdout."""

    def close(self) -> None:
        """No more commands."""


class VshGuest:
    """vsh's Python API: each command has a connection of its own."""

    def __init__(self, address: Address) -> None:
        self._client = Client(address, timeout_s=CONNECT_TIMEOUT_S)

    def run(self, argv: list[str]) -> tuple[int, bytes]:
        result = self._client.run(argv, timeout=CONNECT_TIMEOUT_S)
        return result.exit, result.stdout

    def time_bulk(self, way: str, size: int) -> float:
        """Seconds of a session that brings `size` bytes out, or takes them in. Raises HostError when it does not."""
        if way == "out":
            return self.time_session(plan_source(size), b"", size)
        return self.time_session(["sh", "-c", "cat >/dev/null"], bytes(size), 0)

    def time_session(self, argv: list[str], data: bytes, wanted: int) -> float:
        """Seconds of a session that is given `data`; raises HostError unless it says `wanted` bytes and ends well."""
        sink = _Counter()
        started_s = time.perf_counter()
        session = self._client.open_session(argv)
        try:
            end = Pump(session, BytesSource(data), {messages.STDOUT: sink}).run(time.monotonic() + BULK_TIMEOUT_S)
        finally:
            session.close()
        taken_s = time.perf_counter() - started_s
        if (end.code, sink.size) != (0, wanted):
            raise HostError(f"'{argv[0]}' in the guest: status {end.code}, {sink.size} bytes of {wanted}")
        return taken_s

    def close(self) -> None:
        pass


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

    def run(self, argv: list[str]) -> tuple[int, bytes]:
        _, stdout, _ = self._client.exec_command(" ".join(argv), timeout=CONNECT_TIMEOUT_S)
        output = stdout.read()
        return stdout.channel.recv_exit_status(), bytes(output)

    def close(self) -> None:
        self._client.close()


def time_command(guest: Guest, argv: list[str]) -> float:
    """Seconds of one command. Raises HostError when it fails."""
    started_s = time.perf_counter()
    status, _ = guest.run(argv)
    taken_s = time.perf_counter() - started_s
    if status != 0:
        raise HostError(f"'{argv[0]}' failed in the guest with status {status}")
    return taken_s
