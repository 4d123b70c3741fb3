"""Keeps a pool: makes machines until the stock is full, and gives them to clients.

It makes one machine at a time, so that it takes little from what the clients do. While no machine waits, it makes as
many at once as the host has processors: then the clients wait for it.

It ends on a `stop`, on SIGTERM, and with its owner. Its machines end with it, except those that were taken.
"""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace

from vmkit.errors import NameInUseError
from vmkit.machine import pause, stop
from vmkit.machine.probe import read_available_memory_mib
from vmkit.machine.spec import MachineSpec
from vmkit.machine.start import Started, start_machine
from vmkit.pool.stock import Stock
from vmkit.pool.words import (
    MAX_LINE_BYTES,
    TAKEN,
    PoolLineError,
    Status,
    Verb,
    parse_request,
    render_answer,
    render_status,
)
from vsh.address import address_of
from vsh.client import Client
from vsh.errors import ExecError, VshError
from vsh.registry import find_machine

# Before an order on its socket.
LENGTH_BYTES = 4
# A first command on a busy host.
WARM_DEADLINE_S = 60.0
# After a machine that could not be made, the next try waits so long, and twice as long each time.
PAUSE_S, PAUSE_MAX_S = 1.0, 60.0
# After so many in a row, clients that wait get the error.
FAILURES_MAX = 2
# What a waiting machine may take beside its memory, and what the host keeps.
BESIDE_MIB, SPARE_MIB = 64, 256


@dataclass(frozen=True, slots=True)
class Order:
    """What a keeper is started with. owner: the process id that the pool ends with; 0: none."""

    spec: MachineSpec
    name: str
    size: int
    owner: int


class NoRoomError(VshError):
    """The host has too little memory at the moment."""


class Keeper:
    """Invariant: every machine in the stock is in `_machines`, and its monitor is a child of this process."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stock = Stock(order.size)
        self._machines: dict[str, Started] = {}
        self._made = 0
        self._making: set[str] = set()
        self._error = ""
        self._waiting: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._room.set()
        self._is_over = asyncio.Event()

    async def run(self, listener: socket.socket) -> None:
        """Keeps the pool until its end."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._is_over.set)
        self._loop.add_signal_handler(signal.SIGCHLD, self._reap)
        with contextlib.ExitStack() as stack:
            if self._order.owner:
                owner = os.pidfd_open(self._order.owner)
                stack.callback(os.close, owner)
                self._loop.add_reader(owner, self._is_over.set)
            server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_LINE_BYTES)
            filling = asyncio.create_task(self._fill())
            await self._is_over.wait()
            server.close()
            filling.cancel()
            await asyncio.to_thread(self._end_all)

    # Making machines.

    async def _fill(self) -> None:
        pause_s, failures = PAUSE_S, 0
        while True:
            await self._room.wait()
            self._room.clear()
            # After a failure one alone: others would fail in the same way.
            error = await self._make_missing(1 if failures else os.cpu_count() or 1)
            if error is None:
                self._error, pause_s, failures = "", PAUSE_S, 0
                continue
            self._error = error.brief
            failures += 1
            if failures >= FAILURES_MAX and not isinstance(error, NoRoomError):
                self._refuse(error)
            await self._rest(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
            self._room.set()

    async def _make_missing(self, width: int) -> VshError | None:
        """Makes machines until none is missing, or one could not be made. Returns the error.

        width: how many at once while no machine waits.
        """
        making: set[asyncio.Task[Started]] = set()
        error: VshError | None = None
        try:
            while True:
                at_once = 1 if self._stock.waiting else width
                while error is None and len(making) < min(self._stock.missing, at_once):
                    making.add(asyncio.create_task(self._make(len(making) + 1)))
                if not making:
                    return error
                # A client that asks meanwhile may be one more for whom a machine is missing.
                asked = asyncio.create_task(self._room.wait())
                done, _ = await asyncio.wait({asked, *making}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
                self._room.clear()
                for task in making & done:
                    making.remove(task)
                    error = self._adopt(task) or error
        finally:
            for task in making:
                task.cancel()

    def _adopt(self, task: "asyncio.Task[Started]") -> VshError | None:
        """Puts a machine that was made into the stock. Returns the error of one that was not."""
        try:
            started = task.result()
        except NameInUseError:
            # A machine that an earlier pool of this name has given away.
            return None
        except VshError as error:
            return error
        self._machines[started.name] = started
        self._stock.add(started.name)
        self._reap()
        return None

    async def _rest(self, pause_s: float) -> None:
        """Waits before the next try. A new client ends the wait, but for its first second."""
        await asyncio.sleep(PAUSE_S)
        self._room.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._room.wait(), pause_s - PAUSE_S)

    def _refuse(self, error: VshError) -> None:
        """Answers the clients that wait: they would wait until their deadlines."""
        text = f"no machine of the pool '{self._order.name}' can be made: {error.brief}"
        for writer in self._waiting:
            writer.write(render_answer(error=text, hint=error.hint))
        self._waiting.clear()

    async def _make(self, count: int) -> Started:
        """One more machine, in a thread that does not outlive this process. Raises VshError.

        count: how many are being made, this one included.
        """
        self._made += 1
        name = f"{self._order.name}-{self._made}"
        self._making.add(name)
        spec = replace(self._order.spec, name=name)
        done: asyncio.Future[Started] = self._loop.create_future()

        def work() -> None:
            try:
                result: Started | BaseException = _make_parked(spec, count)
            except BaseException as error:  # it is raised where it is awaited
                result = error
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(settle, result)

        def settle(result: Started | BaseException) -> None:
            if done.cancelled():
                return
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                done.set_result(result)

        threading.Thread(target=work, daemon=True).start()
        try:
            return await done
        finally:
            self._making.discard(name)

    def _reap(self) -> None:
        """Takes note of machines that have ended."""
        for name, started in list(self._machines.items()):
            if started.monitor.poll() is not None:
                del self._machines[name]
                self._stock.lose(name)
                self._room.set()

    def _end_all(self) -> None:
        """Kills all machines that were not taken. One that is being made ends with this process."""
        for name in (*self._stock.waiting, *self._stock.promised):
            entry = find_machine(name=name)
            if entry is not None and entry.state == "pooled":
                with contextlib.suppress(VshError):
                    stop.kill(entry)

    # Serving clients.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            verb = parse_request(await reader.readline())
            match verb:
                case Verb.TAKE:
                    await self._give(reader, writer)
                case Verb.STATUS:
                    writer.write(render_status(self._find_status()))
                case Verb.STOP:
                    names = [*self._stock.waiting, *self._stock.promised, *self._making]
                    writer.write(render_answer(machines=names))
                    self._is_over.set()
            await writer.drain()
        except PoolLineError as error:
            writer.write(render_answer(error=str(error)))
        except (OSError, ValueError):
            # A line over the limit is a ValueError of readline: its sender is not a client of ours.
            pass
        finally:
            writer.close()

    async def _give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Promises a machine to the client, and waits until it has taken it, or is gone."""
        name, is_taken = "", False

        def give(given: str) -> None:
            nonlocal name
            name = given
            self._waiting.discard(writer)
            writer.write(render_answer(machine=given))

        self._waiting.add(writer)
        self._stock.ask(give)
        self._room.set()
        try:
            is_taken = bool(await reader.read(len(TAKEN)))
        finally:
            self._waiting.discard(writer)
            self._stock.leave(give)
            if name:
                self._settle(name, is_taken=is_taken)
            self._room.set()

    def _settle(self, name: str, *, is_taken: bool) -> None:
        """Counts a promised machine as taken, or ends it: a client that is gone may have asked its monitor."""
        if is_taken:
            self._stock.settle(name)
            return
        self._stock.lose(name)
        if name in self._machines:
            self._machines[name].monitor.terminate()

    def _find_status(self) -> Status:
        order = self._order
        return Status(
            name=order.name,
            image=order.spec.image,
            size=order.size,
            waiting=tuple(self._stock.waiting),
            taken=self._stock.taken,
            error=self._error,
        )


def _make_parked(spec: MachineSpec, count: int) -> Started:
    """A machine that has run a command, so that the next one is quick, and is paused. Raises VshError.

    count: machines that are being made; the others' memory may not be in use yet.
    """
    needed_mib = (spec.memory_mib + BESIDE_MIB) * count + SPARE_MIB
    available_mib = read_available_memory_mib()
    if available_mib and available_mib < needed_mib:
        raise NoRoomError(f"{available_mib} MiB of memory are available, and {_describe(count)} {needed_mib}")
    started = start_machine(spec, is_owned=True)
    try:
        entry = find_machine(name=started.name)
        if entry is None:
            raise VshError(f"'{started.name}' ended before it was taken")
        # First: the session that sets the clock takes vshd's spare, and the command leaves another.
        pause.measure_clock(entry)
        # A root of a user's may have no such program.
        with contextlib.suppress(ExecError):
            Client(address_of(entry)).run(["true"], timeout=WARM_DEADLINE_S)
        pause.park(entry)
    except BaseException:
        started.monitor.terminate()
        raise
    return started


def _describe(count: int) -> str:
    return "one more machine needs" if count == 1 else f"{count} more machines need"
