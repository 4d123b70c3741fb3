"""Keeps the failures of a guest's services, which the guest reports while it runs (`up --cores`).

The guest is believed nothing: every length has a limit, and a guest whose services fail without end costs a number of
crashes. The last lines of a service's log come from the log that the host keeps of the guest.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vmkit.crashes.merge import join_service
from vmkit.crashes.record import MAX_LINES, Crash, CrashKind, FailedService, ServiceEnd
from vmkit.crashes.store import bound, make_crash
from vmkit.errors import VmkitError
from vmkit.machine.launch import CrashPlan, Layout
from vmkit.machine.words import Answer, Request
from vmkit.monitor.connection import connect, keep_connected
from vmkit.monitor.cores import name_signal
from vsh.errors import ExecError, VshError
from vsh.text import clean_line
from vshd.wire import units
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.units import UnitFacts, UnitReader

if TYPE_CHECKING:
    from vmkit.monitor.guest import LinkedGuest

# The commands that follow READY have the guest's processor to themselves. What fails meanwhile is reported later.
FIRST_S = 2.0
# A guest under emulation on a busy host takes seconds for a session.
CONNECT_S = 20.0
# After a refusal that may pass.
REFUSED_S = 60.0
READ_SIZE = 1 << 14
# The guest has a limit of 10. This one is for a guest that lies.
BURST, BURST_S = 30, 60.0
# Between two events about failures that were left out.
LOST_S = 10.0
# One failure is reported again after each new connection.
MAX_SEEN = 1000
# Of the guest's clock: a year of five digits can be printed.
MAX_TIME_S = 1 << 40
# systemd's last word about a failure comes into the log beside the failure. So long, and so often, it is waited for.
LOG_S, LOG_ATTEMPTS, LOG_PAUSE_S = 20.0, 4, 0.3
# It may be a moment older than the failure, whose time has no fractions.
SKEW_S = 1.0
LOG_BYTES = 1 << 18
FAILED_WORDS = "Failed with result"
_ENDS = {
    units.EXITED: ServiceEnd.EXITED,
    units.KILLED: ServiceEnd.KILLED,
    units.DUMPED: ServiceEnd.DUMPED,
}


class UnitKeeper:
    """The failed services of one machine. Invariant: `_seen` has the failures that came, at most MAX_SEEN."""

    name: ClassVar[str] = "services"
    requests: ClassVar[tuple[type[Request], ...]] = ()

    def __init__(self, guest: "LinkedGuest") -> None:
        self._guest = guest
        self._seen: dict[tuple[bytes, ...], None] = {}
        self._starts: list[float] = []
        self._lost = 0
        self._told_s = -LOST_S

    async def keep(self) -> None:
        """Connects, reads and connects again, until cancelled or the guest turns out to have no systemd."""
        plan = self._guest.crashes
        if plan is None or not plan.cores:
            return
        await asyncio.sleep(FIRST_S)
        told = ""

        async def follow() -> None:
            nonlocal told
            fd, rest = await connect(lambda: self._guest.open_units(CONNECT_S))
            told = ""
            await self._receive(fd, rest, plan)

        while True:
            try:
                await keep_connected(follow, self._guest.is_stopped)
            except (VshError, RemoteProtocolError) as error:
                if isinstance(error, ExecError) and is_without_systemd(error):
                    return
                # One event for a reason, however long it stays.
                if told != str(error):
                    told = str(error)
                    self._guest.events.add("no-services", {"why": told})
                if not isinstance(error, ExecError):
                    return
            await asyncio.sleep(REFUSED_S)

    async def answer(self, request: Request) -> Answer:
        """It has no requests."""
        return Answer(False, f"the failed services have no answer to {type(request).__name__}")

    async def _receive(self, fd: int, data: bytes, plan: CrashPlan) -> None:
        """One connection, to its end. Raises RemoteProtocolError."""
        loop = asyncio.get_running_loop()
        self._guest.events.add("services")
        reader = UnitReader()
        with socket.socket(fileno=fd) as sock:
            sock.setblocking(False)
            try:
                while True:
                    for value in reader.feed(data):
                        await self._take(value, plan)
                    # sock_recv() does not wait as long as there is something to read.
                    await asyncio.sleep(0)
                    data = await loop.sock_recv(sock, READ_SIZE)
                    if not data:
                        return
            except OSError:
                # The guest has gone, or its vshd has.
                pass
            finally:
                self._tell_lost()

    async def _take(self, value: UnitFacts | int, plan: CrashPlan) -> None:
        if isinstance(value, int):
            self._lose(value)
            return
        key = tuple(text[: units.NAME_MAX] for text in (value.unit, value.invocation, value.result, b"%d" % value.pid))
        if key in self._seen:
            return
        now_s = time.monotonic()
        self._starts = [start_s for start_s in self._starts if now_s - start_s < BURST_S]
        if len(self._starts) >= BURST:
            self._lose(1)
            return
        self._starts.append(now_s)
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        service = make_service(value, await self._find_lines(value))
        self._guest.events.add(*await asyncio.shield(asyncio.to_thread(self._keep, service, plan)))

    def _lose(self, count: int) -> None:
        self._lost += count
        if time.monotonic() - self._told_s >= LOST_S:
            self._tell_lost()

    def _tell_lost(self) -> None:
        """A guest that lies must not fill the machine's events."""
        if self._lost:
            self._guest.events.add("services-lost", {"count": self._lost})
            self._told_s = time.monotonic()
            self._lost = 0

    async def _find_lines(self, facts: UnitFacts) -> tuple[str, ...]:
        """The last lines of the service's log, as far as they come in time."""
        lines: tuple[str, ...] = ()
        wait = self._guest.await_syslog
        if wait is None:
            return lines
        try:
            async with asyncio.timeout(LOG_S):
                for attempt in range(LOG_ATTEMPTS):
                    await wait()
                    path = self._guest.open_log(Layout.SYSLOG).path
                    lines, is_whole = await asyncio.to_thread(read_lines, path, facts)
                    if is_whole:
                        break
                    await asyncio.sleep(LOG_PAUSE_S * 2**attempt)
        except TimeoutError:
            pass
        return lines

    def _keep(self, service: FailedService, plan: CrashPlan) -> tuple[str, dict[str, object]]:
        """Makes a crash of a failure, or adds it to that of its core; the event. A full disk loses it alone."""
        record, machine = self._guest.record, self._guest.name
        new = None
        try:
            new = make_crash(plan.folder, machine)
            crash = Crash(
                kind=CrashKind.SERVICE,
                at_s=time.time(),
                brief=describe(service),
                image=str(record.get("image", "")),
                digest=str(record.get("digest", "")),
                root=plan.root,
                service=service,
            )
            folder, is_new = join_service(plan.folder, machine, crash, new.publish)
            bound(plan.folder, machine)
        except (VmkitError, OSError) as error:
            return "no-crash", {"why": str(error)}
        finally:
            if new is not None:
                new.close()
        return "crash" if is_new else "service-failed", {"folder": str(folder), "brief": crash.brief}


def is_without_systemd(error: ExecError) -> bool:
    """Whether a guest has refused because it has no systemd."""
    from vsh.units import NO_SYSTEMD  # noqa: PLC0415 - few machines keep failures, and this one has loaded it

    return error.kind == NO_SYSTEMD


def make_service(facts: UnitFacts, lines: tuple[str, ...] = ()) -> FailedService:
    """What the record has of a guest's facts."""
    return FailedService(
        unit=facts.unit[: units.NAME_MAX].decode(errors="replace"),
        result=facts.result[: units.RESULT_MAX].decode(errors="replace"),
        end=_ENDS.get(facts.code, ServiceEnd.UNKNOWN),
        status=facts.status if facts.code in _ENDS else 0,
        pid=facts.pid if facts.code in _ENDS else 0,
        invocation=facts.invocation[: units.INVOCATION_SIZE].hex(),
        time_s=min(facts.time_s, MAX_TIME_S),
        restarts=facts.restarts,
        is_restarted=facts.is_restarted,
        log=lines,
    )


def describe(service: FailedService) -> str:
    """A line for a person."""
    text = f"{clean_line(service.unit)} failed: {clean_line(service.result)}"
    if service.end is ServiceEnd.UNKNOWN:
        return text
    if service.end is ServiceEnd.EXITED:
        return f"{text}, its main process (pid {service.pid}) exited with {service.status}"
    return f"{text}, its main process (pid {service.pid}) was ended by {name_signal(service.status)}"


def read_lines(path: Path, facts: UnitFacts) -> tuple[tuple[str, ...], bool]:
    """The last lines of a service in the log that the host keeps, and whether systemd's last word is among them.

    path: of the log's file.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_BYTES))
            data = file.read(LOG_BYTES)
    except OSError:
        return (), False
    records = list(_pick_records(data.splitlines(), facts.unit.decode(errors="replace"), facts.pid))
    # A service that is started again has failed before.
    is_whole = any(FAILED_WORDS in text and time_s >= facts.time_s - SKEW_S for time_s, text in records)
    return tuple(text for _, text in records[-MAX_LINES:]), is_whole


def _pick_records(lines: list[bytes], unit: str, pid: int) -> Iterator[tuple[float, str]]:
    """The records of a service: when, by the guest's clock, and the text."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            # The first one is not whole.
            continue
        text, time_s = (record.get("text"), record.get("time")) if isinstance(record, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(time_s, int | float):
            continue
        # systemd's own lines begin with the unit. An older journal names no units, but the writer's process.
        is_systemd = (record.get("pid"), record.get("uid")) == (1, 0) and text.startswith(f"{unit}: ")
        is_own = record.get("unit") == unit or ("unit" not in record and 0 < pid == record.get("pid"))
        if is_systemd or is_own:
            yield time_s, text
