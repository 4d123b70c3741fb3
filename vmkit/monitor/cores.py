"""Keeps the core dumps of a guest's programs, which the guest sends while it runs (`up --cores`).

The guest is believed nothing: what it sends has an order, and every length a limit. A guest that crashes without end
costs a number of crashes, and their bytes.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from vmkit.crashes.dump import SparseFile
from vmkit.crashes.merge import join_core
from vmkit.crashes.record import Crash, CrashKind, Program
from vmkit.crashes.store import CORE, MAPS, NewCrash, bound, make_crash
from vmkit.errors import MachineError, VmkitError
from vmkit.machine.launch import CrashPlan
from vmkit.machine.words import Answer, Request
from vmkit.monitor.connection import connect, keep_connected
from vmkit.monitor.pipes import read_pipe
from vsh.errors import ExecError, VshError
from vsh.text import clean_line
from vshd.wire import cores
from vshd.wire.cores import CoreFacts, CoreReader
from vshd.wire.errors import RemoteProtocolError

if TYPE_CHECKING:
    from vmkit.monitor.guest import LinkedGuest

# A guest under emulation on a busy host takes seconds for a session.
CONNECT_S = 20.0
# After a refusal. Its reason may pass, such as another program that gets the guest's cores.
REFUSED_S = 60.0
# Of data. Zeros cost no room, but time.
MAX_CORE_BYTES = 1 << 30
MAX_SPAN_BYTES = 4 * MAX_CORE_BYTES
MIN_FREE_BYTES = 256 << 20
# The guest has a limit of 10 for root and of 10 for all others. This one is for a guest that lies.
BURST, BURST_S = 30, 60.0
# Of a record, which must stay one that can be read: a guest may send more.
NAME_BYTES, COMMAND_BYTES, PATH_BYTES = 64, 4096, 4096
# Between two events about cores that were left out.
LOST_S = 10.0

Note = Callable[[str, Mapping[str, object]], None]


class CoreKeeper:
    """The cores of one machine."""

    name: ClassVar[str] = "cores"
    requests: ClassVar[tuple[type[Request], ...]] = ()

    def __init__(self, guest: "LinkedGuest") -> None:
        self._guest = guest

    async def keep(self) -> None:
        """Connects, reads and connects again, until cancelled or the guest turns out to know no cores."""
        plan = self._guest.crashes
        if plan is None or not plan.cores:
            return
        told = ""

        async def follow() -> None:
            nonlocal told
            fd, rest = await connect(partial(self._guest.open_cores, MAX_CORE_BYTES, CONNECT_S))
            told = ""
            await self._receive(fd, rest, plan)

        while True:
            try:
                await keep_connected(follow, self._guest.is_stopped)
            except (VshError, RemoteProtocolError) as error:
                # One event for a reason, however long it stays.
                if told != str(error):
                    told = str(error)
                    self._guest.events.add("no-cores", {"why": told})
                if not isinstance(error, ExecError):
                    return
            await asyncio.sleep(REFUSED_S)

    async def answer(self, request: Request) -> Answer:
        """It has no requests."""
        return Answer(False, f"the cores have no answer to {type(request).__name__}")

    async def _receive(self, fd: int, rest: bytes, plan: CrashPlan) -> None:
        """One connection, to its end. Raises RemoteProtocolError."""
        loop = asyncio.get_running_loop()

        def note(event: str, data: Mapping[str, object]) -> None:
            loop.call_soon_threadsafe(self._guest.events.add, event, data)

        self._guest.events.add("cores")
        receiver = CoreReceiver(plan, self._guest.name, self._guest.record, note)
        try:
            # The rest in the first piece: closing fd is read_pipe's from the beginning.
            await read_pipe(fd, receiver.feed, rest)
        except OSError:
            # The guest has gone, or its vshd has.
            pass
        finally:
            await asyncio.to_thread(receiver.close)


class CoreReceiver:
    """Makes crashes of what a guest sends. Invariant: `_new` is open while a core is, unless it is left out."""

    def __init__(self, plan: CrashPlan, machine: str, record: Mapping[str, object], note: Note) -> None:
        self._plan = plan
        self._machine = machine
        self._record = record
        self._note = note
        self._reader = CoreReader()
        self._new: NewCrash | None = None
        self._facts = CoreFacts()
        self._file: SparseFile | None = None
        self._fd = -1
        self._at = 0
        self._trouble = ""
        self._starts: list[float] = []
        self._lost = 0
        self._told_s = -LOST_S

    def feed(self, data: bytes) -> None:
        """Takes the next bytes. Raises RemoteProtocolError."""
        for kind, value in self._reader.feed(data):
            if isinstance(value, CoreFacts):
                self._begin(value)
            elif isinstance(value, bytes):
                self._write(value)
            elif kind == cores.HOLE:
                self._at += value
                self._write(b"")
            elif kind == cores.END:
                self._end(is_whole=value == cores.WHOLE)
            else:
                self._lose(value)

    def close(self) -> None:
        """Keeps what has come of a core whose connection broke."""
        self._end(is_whole=False)
        self._tell_lost()

    def _lose(self, count: int) -> None:
        self._lost += count
        if time.monotonic() - self._told_s >= LOST_S:
            self._tell_lost()

    def _tell_lost(self) -> None:
        """A guest that lies must not fill the machine's events."""
        if self._lost:
            self._note("cores-lost", {"count": self._lost})
            self._told_s = time.monotonic()
            self._lost = 0

    def _begin(self, facts: CoreFacts) -> None:
        now_s = time.monotonic()
        self._starts = [start_s for start_s in self._starts if now_s - start_s < BURST_S]
        if len(self._starts) >= BURST:
            self._lose(1)
            return
        self._starts.append(now_s)
        self._facts, self._at, self._trouble = facts, 0, ""
        try:
            self._open(facts)
        except (MachineError, OSError) as error:
            # A disk that is full now may have room for the next one.
            self._note("no-crash", {"why": str(error)})
            self._discard()

    def _open(self, facts: CoreFacts) -> None:
        """Raises MachineError, OSError."""
        new = self._new = make_crash(self._plan.folder, self._machine)
        (new.folder / MAPS).write_bytes(facts.maps)
        (new.folder / MAPS).chmod(0o600)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(new.folder / CORE, flags, 0o600)
        status = os.fstatvfs(self._fd)
        free_bytes = max(0, status.f_bavail * status.f_frsize - MIN_FREE_BYTES)
        self._file = SparseFile(self._fd, min(MAX_CORE_BYTES, free_bytes))

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            if self._at + len(data) > MAX_SPAN_BYTES:
                raise MachineError("the core is too long")
            self._file.write(self._at, data)
            self._at += len(data)
        except MachineError:
            # What stands in the file is worth keeping: gdb finds most in a part.
            self._trouble = "the core is larger than there is room for"
            self._finish_file()
        except OSError as error:
            self._trouble = f"cannot write the core: {error.strerror}"
            self._finish_file()

    def _end(self, *, is_whole: bool) -> None:
        """Keeps the core that is open, if any. A full disk loses it, and nothing else."""
        new = self._new
        if new is None:
            return
        self._finish_file()
        try:
            program = make_program(self._facts, is_whole=is_whole and not self._trouble)
            crash = self._make_crash(program, self._trouble if is_whole or self._trouble else "the core is not whole")
            folder = join_core(self._plan.folder, self._machine, crash, new.publish)
            self._note("crash", {"folder": str(folder), "brief": crash.brief})
            bound(self._plan.folder, self._machine)
        except (VmkitError, OSError) as error:
            self._note("no-crash", {"why": str(error)})
        finally:
            self._discard()

    def _make_crash(self, program: Program, trouble: str) -> Crash:
        return Crash(
            kind=CrashKind.CORE,
            at_s=time.time(),
            brief=describe(program),
            image=str(self._record.get("image", "")),
            digest=str(self._record.get("digest", "")),
            trouble=trouble,
            program=program,
            root=self._plan.root,
        )

    def _finish_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.finish()
            self._file = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _discard(self) -> None:
        self._finish_file()
        if self._new is not None:
            self._new.close()
            self._new = None


def make_program(facts: CoreFacts, *, is_whole: bool) -> Program:
    """What the record has of a guest's facts."""
    words = facts.command[:COMMAND_BYTES].split(b"\0")
    return Program(
        pid=facts.pid,
        uid=facts.uid,
        gid=facts.gid,
        signal=facts.signal,
        name=facts.name[:NAME_BYTES].decode(errors="replace"),
        command=tuple(word.decode(errors="replace") for word in (words[:-1] if words[-1:] == [b""] else words)),
        exe=os.fsdecode(facts.exe[:PATH_BYTES]),
        cgroup=facts.cgroup[:PATH_BYTES].decode(errors="replace"),
        is_contained=facts.is_contained,
        is_whole=is_whole,
    )


def describe(program: Program) -> str:
    """A line for a person."""
    where = " in a container" if program.is_contained else ""
    name = name_signal(program.signal)
    return f"{clean_line(program.name)} (pid {program.pid}, uid {program.uid}){where} was ended by {name}"


def name_signal(number: int) -> str:
    """The signal in words."""
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
