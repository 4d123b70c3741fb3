"""Keeps what is left of a guest whose kernel panicked: its log and, where that was asked for, a dump of its memory.

With `up --vmcore` QEMU has the device pvpanic, and stops the guest as soon as the guest's driver reports the panic. So
the registers and the memory are still those of the panic. QEMU writes the dump to a pipe, and this process makes the
file: the ceiling holds, whatever QEMU writes.
"""

import asyncio
import contextlib
import os
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.crashes.dump import SparseFile, open_dump
from vmkit.crashes.record import Crash, CrashKind, DumpFormat
from vmkit.crashes.store import DMESG, DUMP, NewCrash, bound, make_crash
from vmkit.errors import MachineError, VmkitError
from vmkit.machine.launch import CrashPlan, LaunchPlan, Layout
from vmkit.monitor.end import End, explain_trouble
from vmkit.monitor.life import Life
from vmkit.monitor.logs import EventLog
from vmkit.monitor.pipes import read_pipe
from vsh.limits import find_remedy

if TYPE_CHECKING:
    from vmkit.monitor.child import Child
    from vmkit.monitor.console import Console
    from vmkit.monitor.qmp import Qmp

EVENT = "GUEST_PANICKED"
# A panicking kernel prints its trace after the first line, then resets; what has not come by then is not waited for.
TROUBLE_GRACE_S = 1.5
# A dump of 256 MiB takes a second under emulation, and one that compresses four times as long.
DUMP_DEADLINE_S = 600.0
# A dump must not fill its disk: it may take half of what is free.
FREE_SHARE = 2
# As the kernel prints it first.
_BANNER = re.compile(rb"Linux version (\S{1,100})")
MAX_HEAD_BYTES = 64 * 1024
NO_REPORT = "QEMU received no report of the panic: the guest has no driver for pvpanic, or had not loaded it yet"


class PanicKeeper:
    """The panic of one machine. Invariant: `_new` is open from settle() to publish() or close()."""

    def __init__(self, plan: LaunchPlan, life: Life, events: EventLog) -> None:
        self._life = life
        self._machine = plan.name
        self._plan: CrashPlan | None = plan.crashes
        self._record = plan.record
        self._log = plan.directory / Layout.KERNEL_LOG
        self._events = events
        self._new: NewCrash | None = None
        self._dump: DumpFormat | None = None
        self._dump_bytes = 0
        self._trouble = ""
        # QEMU has stopped the guest at its panic.
        self._stopped = asyncio.Event()

    def note(self, name: str, console: "Console | None") -> None:
        """Takes an event of QEMU. The machine ends when QEMU has stopped the guest at its panic."""
        if name == EVENT:
            self._stopped.set()
            self._life.spawn(self._finish(console))

    async def settle(self, end: End, qemu: "Child", qmp: "Qmp | None") -> None:
        """Waits for what a failing guest still says, and takes the dump of one that panicked."""
        if end.reason not in ("panic", "init-error"):
            return
        # The rest of the trace explains more than its first line.
        waits = [asyncio.ensure_future(qemu.wait()), asyncio.ensure_future(self._stopped.wait())]
        await asyncio.wait(waits, timeout=TROUBLE_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        waits[1].cancel()
        if end.reason == "panic":
            await self._take_dump(qmp)

    async def _finish(self, console: "Console | None") -> None:
        """A task of its own, so that the console's reader comes first: it has the kernel's reason."""
        self._life.finish(explain_panic(console, asked=self._life.is_asked))

    async def _take_dump(self, qmp: "Qmp | None") -> None:
        """Takes the dump, if one was asked for and QEMU has stopped the guest. Reports a failure in the events."""
        if self._plan is None or not self._plan.vmcore:
            return
        if qmp is None or not self._stopped.is_set():
            self._note_trouble(NO_REPORT)
            return
        started_s = time.monotonic()
        try:
            self._new = make_crash(self._plan.folder, self._machine)
            format_ = DumpFormat(self._plan.vmcore)
            await self._write_dump(qmp, format_, self._new.folder / DUMP, self._plan.max_bytes)
        except MachineError as error:
            self._note_trouble(error.brief)
        except OSError as error:
            remedy = find_remedy(error)
            self._note_trouble(f"cannot write the dump: {error.strerror or error}" + (f"; {remedy}" if remedy else ""))
        else:
            self._dump = format_
            seconds = round(time.monotonic() - started_s, 3)
            self._events.add("vmcore", {"format": format_.value, "bytes": self._dump_bytes, "seconds": seconds})
            return
        if self._new is not None:
            with contextlib.suppress(OSError):
                (self._new.folder / DUMP).unlink(missing_ok=True)

    async def publish(self, end: End) -> None:
        """Keeps a panic, with the kernel's log that was taken. A full disk loses it, and nothing else."""
        plan = self._plan
        if plan is None or end.reason != "panic":
            return
        try:
            new = self._new = self._new or make_crash(plan.folder, self._machine)
            folder = await asyncio.to_thread(self._fill, new, end, plan)
            self._events.add("crash", {"folder": str(folder)})
            await asyncio.to_thread(bound, plan.folder, self._machine)
        except (VmkitError, OSError) as error:
            self._events.add("no-crash", {"why": str(error)})
        finally:
            self.close()

    def close(self) -> None:
        """Removes what was not published."""
        if self._new is not None:
            self._new.close()
            self._new = None

    def _fill(self, new: NewCrash, end: End, plan: CrashPlan) -> Path:
        release = ""
        if self._log.exists():
            shutil.copyfile(self._log, new.folder / DMESG)
            (new.folder / DMESG).chmod(0o600)
            with self._log.open("rb") as file:
                found = _BANNER.search(file.read(MAX_HEAD_BYTES))
            release = "" if found is None else found[1].decode(errors="replace")
        image, digest = str(self._record.get("image", "")), str(self._record.get("digest", ""))
        return new.publish(
            Crash(
                kind=CrashKind.PANIC,
                at_s=time.time(),
                brief=end.brief,
                image=image,
                digest=digest,
                kernel=release,
                dump=self._dump,
                dump_bytes=self._dump_bytes,
                trouble=self._trouble,
                vmlinux=plan.vmlinux,
                root=plan.root,
            )
        )

    async def _write_dump(self, qmp: "Qmp", format_: DumpFormat, path: Path, max_bytes: int) -> None:
        """Raises MachineError, OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            file = SparseFile(fd, min(max_bytes, _find_free_bytes(fd) // FREE_SHARE))
            dump = open_dump(format_, file)
            read_fd, write_fd = os.pipe()
            reading = asyncio.create_task(read_pipe(read_fd, dump.feed))
            try:
                await qmp.dump_memory(write_fd, format_ is DumpFormat.KDUMP, DUMP_DEADLINE_S)
                await asyncio.wait_for(reading, DUMP_DEADLINE_S)
            except (MachineError, TimeoutError) as error:
                # The reader that gave up is why QEMU could not write.
                reading.cancel()
                (reason,) = await asyncio.gather(reading, return_exceptions=True)
                if isinstance(reason, MachineError | OSError) and reason is not error:
                    raise reason from error
                if isinstance(error, MachineError):
                    raise
                raise MachineError(f"QEMU did not end the dump within {DUMP_DEADLINE_S:g} s") from error
            await asyncio.to_thread(dump.finish)
            self._dump_bytes = file.size_bytes
        finally:
            os.close(fd)

    def _note_trouble(self, why: str) -> None:
        self._trouble = why
        self._events.add("no-vmcore", {"why": why})


def explain_panic(console: "Console | None", *, asked: bool) -> End:
    """The end of a guest that QEMU has stopped at its panic. asked: `down` was under way."""
    trouble = None if console is None else console.trouble
    if trouble is not None and explain_trouble(trouble).reason == "panic":
        return End("panic", explain_trouble(trouble).brief, expected=asked)
    return End("panic", "the guest's kernel panicked", expected=asked)


def _find_free_bytes(fd: int) -> int:
    """What a file's disk has room for. Raises OSError."""
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize
