"""Plugs the virtiofs devices of folders that are shared while the machine runs, and takes them out again.

Another process serves the device, and the monitor gives QEMU the connection to it. A device is taken out when that
process asks for it or has ended.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmkit.errors import MachineError
from vmkit.machine.parts.part import Fitting, JsonObject, QmpCommand
from vmkit.machine.words import Answer, FolderRequest, PlugFolder, UnplugFolder
from vmkit.monitor.life import Life
from vmkit.monitor.logs import EventLog

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp

# As the requests of a guest with many programs need.
QUEUE_SIZE = 1024
# A guest that is busy or paused lets go of the device later. The asker does not wait for it longer.
UNPLUG_DEADLINE_S = 5.0
CONNECT_DEADLINE_S = 5.0


class _Plugged:
    """A port that is taken, until its device is out of the guest."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.removal: asyncio.Task[None] | None = None


class Folders:
    """Invariant: `_plugged` has each port that a device is in, or may be in."""

    def __init__(self, plans: Sequence[Fitting], life: Life, events: EventLog) -> None:
        self._ports = [port for plan in plans for port in plan.ports]
        self._plugged: dict[str, _Plugged] = {}
        self._life = life
        self._events = events

    @property
    def count(self) -> int:
        """How many ports are taken. QEMU saves no machine with such a device."""
        return len(self._plugged)

    async def answer(self, request: FolderRequest, qmp: "Qmp", *, is_running: bool) -> Answer:
        """Does what is asked, or says why not. is_running: the guest is not paused."""
        try:
            if isinstance(request, PlugFolder):
                if not is_running:
                    return Answer(False, "the machine is paused")
                return await self._plug(request, qmp)
            return await self._unplug(request, qmp, UNPLUG_DEADLINE_S if is_running else 0)
        except MachineError as error:
            return Answer(False, error.brief, error.hint)
        except OSError as error:
            # That of a deadline has no text.
            reason = error.strerror or f"{error}" or "it does not answer"
            return Answer(False, f"cannot reach the process that serves the folder: {reason}")

    async def _plug(self, request: PlugFolder, qmp: "Qmp") -> Answer:
        port = next((port for port in self._ports if port not in self._plugged), None)
        if port is None:
            why = f"all {len(self._ports)} are taken" if self._ports else "machines of its kind have none"
            return Answer(False, f"the machine has no free port: {why}")
        if any(request.tag == one.tag for one in self._plugged.values()):
            return Answer(False, f"the machine has a folder {request.tag} already")
        plugged = self._plugged[port] = _Plugged(request.tag)
        try:
            owner = os.pidfd_open(request.owner)
            try:
                await self._give(request, port, qmp)
            except BaseException:
                os.close(owner)
                raise
        except BaseException:
            del self._plugged[port]
            raise
        self._events.add("folder-plugged", {"port": port, "tag": request.tag})
        self._life.spawn(self._watch(owner, port, plugged, qmp))
        return Answer(True)

    async def _give(self, request: PlugFolder, port: str, qmp: "Qmp") -> None:
        """Raises MachineError, OSError; then QEMU has neither."""
        chardev, fd_name = f"{port}-char", f"{port}-fd"
        address: JsonObject = {"addr": {"type": "fd", "data": {"str": fd_name}}, "server": False}
        device: JsonObject = {
            "driver": "vhost-user-fs-pci",
            "id": f"{port}-fs",
            "bus": port,
            "chardev": chardev,
            "tag": request.tag,
            "queue-size": QUEUE_SIZE,
        }
        plug = QmpCommand("chardev-add", {"id": chardev, "backend": {"type": "socket", "data": address}})
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await asyncio.get_running_loop().sock_connect(connection, request.socket)
            await qmp.plug(Fitting(port, plug=(plug,), fd_name=fd_name), connection.fileno())
        try:
            await qmp.execute("device_add", device)
        except MachineError:
            await qmp.execute("chardev-remove", {"id": chardev})
            raise

    async def _watch(self, owner: int, port: str, plugged: _Plugged, qmp: "Qmp") -> None:
        """Waits for the end of the process that serves the device."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(owner, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(owner)
            os.close(owner)
        await self._remove(port, plugged, qmp)

    async def _unplug(self, request: UnplugFolder, qmp: "Qmp", deadline_s: float) -> Answer:
        found = next(((port, one) for port, one in self._plugged.items() if one.tag == request.tag), None)
        if found is None:
            return Answer(True)
        removal = self._remove(*found, qmp)
        await asyncio.wait([removal], timeout=deadline_s)
        return Answer(True) if removal.done() else Answer(False, "the guest has not let go of the device yet")

    def _remove(self, port: str, plugged: _Plugged, qmp: "Qmp") -> "asyncio.Task[None]":
        """Takes the device out, once; the guest may take its time."""
        if plugged.removal is None:
            plugged.removal = self._life.spawn(self._take_out(port, plugged, qmp))
        return plugged.removal

    async def _take_out(self, port: str, plugged: _Plugged, qmp: "Qmp") -> None:
        try:
            await qmp.unplug(f"{port}-fs", None)
            await qmp.execute("chardev-remove", {"id": f"{port}-char"})
        except MachineError as error:
            # The port stays taken.
            self._events.add("folder-stuck", {"port": port, "why": error.brief})
            return
        self._events.add("folder-unplugged", {"port": port, "tag": plugged.tag})
        del self._plugged[port]
