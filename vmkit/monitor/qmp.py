"""Controls QEMU through qemu.qmp: takes it over on a socket we made, plugs devices, runs it, receives its events.

Only the monitor is async.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from vmkit.errors import MachineError
from vmkit.machine.parts.part import Fitting
from vmkit.monitor.life import RefusedError
from vmkit.monitor.logs import CappedLog

# QEMU answers in milliseconds; a host that swaps may take seconds.
CONNECT_DEADLINE_S = 30.0
COMMAND_DEADLINE_S = 30.0


class _WireLog(logging.Handler):
    """Every QMP message, as qemu.qmp's own debug lines show them, into a capped file."""

    def __init__(self, log: CappedLog) -> None:
        super().__init__(logging.DEBUG)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith(("-->", "<--")):
            self._log.write(text.encode(errors="replace") + b"\n")


class Qmp:
    """One QMP session with a QEMU of ours."""

    def __init__(self, name: str, log: CappedLog) -> None:
        self._client = QMPClient(name)
        self._client.logger.setLevel(logging.DEBUG)
        self._client.logger.propagate = False
        self._client.logger.addHandler(_WireLog(log))

    async def connect(self, sock: socket.socket) -> None:
        """Negotiates over a connected socket. Raises MachineError when QEMU does not answer in time."""
        try:
            await asyncio.wait_for(self._client.connect(sock), CONNECT_DEADLINE_S)
        except (QMPError, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise MachineError("QEMU does not answer on its monitor (QMP)", details=str(error)) from error

    async def listen(self, handle: Callable[[str, Mapping[str, object]], None]) -> None:
        """Calls handle(name, data) for every event, until cancelled."""
        with self._client.listener() as listener:
            async for event in listener:
                data = event.get("data")
                handle(str(event["event"]), data if isinstance(data, dict) else {})

    async def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """One command. Raises MachineError with QEMU's own words when it is refused."""
        try:
            return await asyncio.wait_for(self._client.execute(name, arguments), COMMAND_DEADLINE_S)
        except ExecuteError as error:
            raise RefusedError(f"QEMU refused '{name}': {error}") from error
        except (QMPError, OSError, TimeoutError) as error:
            raise MachineError(f"QEMU did not answer '{name}'", details=str(error)) from error

    async def plug(self, fitting: Fitting, fd: int | None) -> None:
        """Runs the commands that plug a part; before them QEMU gets the part's descriptor by name, where it has one."""
        if fd is not None:
            try:
                self._client.send_fd_scm(fd)
            except (QMPError, OSError) as error:
                raise MachineError("cannot pass a descriptor to QEMU", details=str(error)) from error
            await self.execute("getfd", {"fdname": fitting.fd_name})
        for command in fitting.plug:
            await self.execute(command.name, command.arguments)

    async def unplug(self, device: str, deadline_s: float) -> None:
        """Takes a device out, unless the guest has ejected it, and waits until the guest has let go of it."""
        with self._client.listener({"DEVICE_DELETED"}) as listener:
            try:
                await self.execute("device_del", {"id": device})
            except RefusedError as error:
                if isinstance(error.__cause__, ExecuteError) and error.__cause__.error_class == "DeviceNotFound":
                    return
                raise
            async with asyncio.timeout(deadline_s):
                await _wait_for_deletion(listener, device)

    async def query_run_state(self) -> str:
        """QEMU's RunState: running, paused, internal-error, ..."""
        answer = await self.execute("query-status")
        return str(answer.get("status")) if isinstance(answer, dict) else "unknown"


async def _wait_for_deletion(listener: "object", device: str) -> None:
    message: Message
    async for message in listener:  # type: ignore[attr-defined]
        data = message.get("data")
        if isinstance(data, dict) and data.get("device") == device:
            return
