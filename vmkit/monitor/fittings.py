"""What the monitor does for the parts of its machine, by their plans alone: sockets, plugs, companions.

The list is the launch plan's, in its order. No part is known here by name.
"""

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.errors import VmkitError
from vmkit.machine.parts.part import Companion, Fitting
from vmkit.monitor.companion import CompanionProcess
from vmkit.monitor.life import Life, RefusedError
from vmkit.monitor.logs import CappedLog, EventLog

if TYPE_CHECKING:
    from vmkit.monitor.qmp import Qmp

UNPLUG_DEADLINE_S = 10.0


class Fittings:
    """The fittings of one machine. Invariant: a part that has a companion is in `companions` from its start on.

    listen: makes a socket in the machine's directory; open_log: a log there.
    """

    def __init__(
        self,
        plans: Sequence[Fitting],
        life: Life,
        events: EventLog,
        listen: Callable[[str], socket.socket],
        open_log: Callable[[str], CappedLog],
    ) -> None:
        self.companions: dict[str, CompanionProcess] = {}
        self._plans = plans
        self._life = life
        self._events = events
        self._listen = listen
        self._open_log = open_log
        self._qmp: Qmp | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[Mapping[str, int]]:
        """The sockets that QEMU serves, by chardev, until QEMU has them."""
        with contextlib.ExitStack() as stack:
            served = {}
            for plan in self._plans:
                for one in plan.sockets:
                    served[one.chardev] = stack.enter_context(self._listen(one.file)).fileno()
            yield served

    async def open(self, given_fd: int | None, stack: contextlib.ExitStack) -> dict[str, int]:
        """The descriptors that QEMU gets, by part, open as long as the stack is; companions start now.

        given_fd: the descriptor that came with the plan.
        """
        descriptors = {}
        for plan in self._plans:
            if plan.companion is not None:
                descriptors[plan.part] = stack.enter_context(await self._start(plan, plan.companion)).fileno()
            elif plan.fd_name:
                if given_fd is None:
                    raise VmkitError(f"the part '{plan.part}' needs a descriptor, and vmkit up gave none")
                stack.callback(os.close, given_fd)
                # It is one part's alone.
                descriptors[plan.part], given_fd = given_fd, None
        return descriptors

    async def plug(self, qmp: "Qmp", descriptors: Mapping[str, int]) -> None:
        """Plugs every part into a QEMU that has been taken over. Raises MachineError, EndedError."""
        self._qmp = qmp
        for plan in self._plans:
            try:
                await self._life.or_end(qmp.plug(plan, descriptors.get(plan.part)))
            except RefusedError:
                if plan.part in self.companions:
                    await self.companions[plan.part].raise_if_ended()
                raise

    async def unplug(self) -> None:
        """Takes the devices out whose state is not saved: those with a process beside QEMU, and the kernel's vsock."""
        qmp = self._qmp
        assert qmp is not None
        for plan in self._plans:
            if plan.companion is not None:
                self.companions[plan.part].dismiss()
                await self._take_out(qmp, plan.companion)
            elif plan.device:
                await qmp.unplug(plan.device, UNPLUG_DEADLINE_S)
        await self.stop()

    async def _take_out(self, qmp: "Qmp", companion: Companion) -> None:
        await qmp.unplug(companion.device, UNPLUG_DEADLINE_S)
        for command in companion.removal:
            await qmp.execute(command.name, command.arguments)

    async def stop(self) -> None:
        """Sees every companion gone."""
        for companion in self.companions.values():
            await companion.stop()

    async def replug(self, plan: Fitting, companion: Companion, connection: socket.socket) -> None:
        """Takes a dead companion's device out of the running guest and puts the new one in."""
        qmp = self._qmp
        if qmp is None:
            raise VmkitError("the monitor has not connected to QEMU yet")
        await self._take_out(qmp, companion)
        await qmp.plug(plan, connection.fileno())

    async def _start(self, plan: Fitting, companion: Companion) -> socket.socket:
        listener = self._listen(companion.listen) if companion.listen else None
        control = self._listen(companion.control) if companion.control else None
        log = self._open_log(companion.log)
        connect = functools.partial(self._connect, companion.serve) if companion.serve else socket.socketpair
        process = self.companions[plan.part] = CompanionProcess(companion, listener, log, control, connect)
        connection = await process.start()

        async def replug(new: socket.socket) -> None:
            await self.replug(plan, companion, new)

        self._life.spawn(process.watch(self._life, self._events, replug))
        return connection

    def _connect(self, name: str) -> tuple[socket.socket, socket.socket]:
        """A listening socket for a companion, and a connection to it, which is the first and stays the only one."""
        listener = self._listen(name)
        path = listener.getsockname()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
            listener.setblocking(True)
        except BaseException:
            connection.close()
            listener.close()
            raise
        finally:
            Path(path).unlink()
        return listener, connection
