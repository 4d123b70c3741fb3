"""Controls QEMU through qemu.qmp: takes it over on a socket we made, plugs devices, runs it, receives its events.

Only the monitor is async.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterable, Callable, Mapping

from qemu.qmp import ExecuteError, QMPClient, QMPError
from qemu.qmp.message import Message

from vmkit.errors import MachineError
from vmkit.machine.parts.part import Fitting
from vmkit.monitor.life import RefusedError
from vmkit.monitor.logs import CappedLog

# QEMU answers in milliseconds; a host that swaps may take seconds.
CONNECT_DEADLINE_S = 30.0
COMMAND_DEADLINE_S = 30.0
CLOSE_DEADLINE_S = 5.0
# The state is a third of a megabyte.
STATE_DEADLINE_S = 30.0
STATE_FD = "state"
DUMP_FD = "dump"


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
            await self.close()
            raise MachineError("QEMU does not answer on its monitor (QMP)", details=str(error)) from error

    async def close(self) -> None:
        """Ends the session. Does nothing when QEMU has closed it, or none was ever open.

        Without it asyncio reports the end of the connection, at some later moment, as an error that no code has read.
        """
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            await asyncio.wait_for(self._client.disconnect(), CLOSE_DEADLINE_S)

    async def listen(self, handle: Callable[[str, Mapping[str, object]], None]) -> None:
        """Calls handle(name, data) for every event, until cancelled."""
        with self._client.listener() as listener:
            async for event in listener:
                data = event.get("data")
                handle(str(event["event"]), data if isinstance(data, dict) else {})

    async def execute(self, name: str, arguments: Mapping[str, object] | None = None) -> object:
        """One command. Raises MachineError with QEMU's own words when it is refused."""
        return await self._execute(name, arguments, COMMAND_DEADLINE_S)

    async def _execute(self, name: str, arguments: Mapping[str, object] | None, deadline_s: float) -> object:
        try:
            return await asyncio.wait_for(self._client.execute(name, arguments), deadline_s)
        except ExecuteError as error:
            raise RefusedError(f"QEMU refused '{name}': {error}") from error
        except (QMPError, OSError, TimeoutError) as error:
            raise MachineError(f"QEMU did not answer '{name}'", details=str(error)) from error

    async def plug(self, fitting: Fitting, fd: int | None) -> None:
        """Runs the commands that plug a part; before them QEMU gets the part's descriptor by name, where it has one."""
        if fd is not None:
            await self._pass(fd, fitting.fd_name)
        for command in fitting.plug:
            await self.execute(command.name, command.arguments)

    async def save_state(self, fd: int) -> None:
        """Writes the state of a stopped machine, all but its memory, to a file. Raises MachineError."""
        await self._migrate(fd, "migrate")

    async def load_state(self, fd: int) -> None:
        """Loads what save_state wrote into a QEMU that waits for it (-incoming defer). Raises MachineError."""
        await self._migrate(fd, "migrate-incoming")

    async def dump_memory(self, fd: int, is_kdump: bool, deadline_s: float) -> None:
        """Has QEMU write the guest's memory and registers to a descriptor, which is closed then. Raises MachineError.

        As an ELF file, or as a flattened kdump.
        """
        try:
            await self._pass(fd, DUMP_FD)
        finally:
            # QEMU has its own: the reader of a pipe sees the end when QEMU closes that.
            os.close(fd)
        what = {"paging": False, "protocol": f"fd:{DUMP_FD}", **({"format": "kdump-zlib"} if is_kdump else {})}
        await self._execute("dump-guest-memory", what, deadline_s)

    async def _migrate(self, fd: int, command: str) -> None:
        # The memory is a file that both sides share; QEMU is not to write it into the state.
        wanted = [{"capability": name, "state": True} for name in ("events", "x-ignore-shared")]
        await self.execute("migrate-set-capabilities", {"capabilities": wanted})
        await self._pass(fd, STATE_FD)
        with self._client.listener({"MIGRATION"}) as listener:
            await self.execute(command, {"uri": f"fd:{STATE_FD}"})
            try:
                async with asyncio.timeout(STATE_DEADLINE_S):
                    async for message in listener:
                        data = message.get("data")
                        status = data.get("status") if isinstance(data, dict) else None
                        if status == "completed":
                            return
                        if status == "failed":
                            raise MachineError(f"QEMU refused the state of the machine ({command} failed)")
            except TimeoutError as error:
                raise MachineError(f"QEMU did not end '{command}' within {STATE_DEADLINE_S:g} s") from error
        raise MachineError(f"QEMU ended during '{command}'")

    async def _pass(self, fd: int, name: str) -> None:
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as error:
            raise MachineError("cannot pass a descriptor to QEMU", details=str(error)) from error
        await self.execute("getfd", {"fdname": name})

    async def unplug(self, device: str, deadline_s: float | None) -> None:
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


async def _wait_for_deletion(listener: AsyncIterable[Message], device: str) -> None:
    async for message in listener:
        data = message.get("data")
        if isinstance(data, dict) and data.get("device") == device:
            return
