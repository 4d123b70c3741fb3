"""The guest's memory in the monitor: makes its file, lends it, and takes the kernel's log out of it.

QEMU gets the file and gives it its size. A snapshot needs the size before QEMU starts: set_size(). The monitor holds
the file as well, so the memory outlives QEMU until the evidence is taken. No other process gets a descriptor: clients
get the text of the log and not the guest's secrets.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vmkit.architectures import HOST
from vmkit.errors import MachineError
from vsh.text import tail_lines

T = TypeVar("T")


class GuestMemory:
    """The memory of one machine. Invariant: the file at `path` is a whole log, or absent.

    path: where the kernel's log goes. architecture: the guest's.
    """

    def __init__(self, path: Path, architecture: str = HOST) -> None:
        self._path = path
        self._architecture = architecture
        self._using = asyncio.Lock()
        self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)

    def set_size(self, size_bytes: int) -> None:
        """Gives the file its size before QEMU starts, and fixes it. Raises OSError."""
        os.ftruncate(self.fd, size_bytes)
        self.seal()

    def seal(self) -> None:
        """Fixes the file's size, once it is set: a process that maps it could die of a shorter one."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)

    async def close(self) -> None:
        """Lets go of the memory, when the last user has."""
        async with self._using:
            os.close(self.fd)

    async def use(self, work: Callable[[int], T]) -> T:
        """Runs work with the file's descriptor, in a thread, when no other work has it."""
        # In a thread: a large memory takes seconds, and the console is read meanwhile.
        async with self._using:
            job = asyncio.create_task(asyncio.to_thread(work, self.fd))
            try:
                return await asyncio.shield(job)
            finally:
                # A thread cannot be cancelled, and it must not use another file of the same number.
                await asyncio.gather(job, return_exceptions=True)

    async def take_log(self) -> bytes:
        """Reads the kernel's log, writes it to the file, and returns it. Raises MachineError, OSError."""
        if self._architecture != HOST:
            # vmkit.memory knows the tables of pages of amd64.
            brief = f"vmkit cannot read the kernel's log in the memory of a guest of {self._architecture}"
            raise MachineError(brief, hint="while the guest answers, ask it: vsh -- dmesg")
        return await self.use(self._take_log)

    async def take_tail(self, lines: int) -> str:
        """Takes the log, and returns its last lines as text. Raises MachineError, OSError."""
        log = await self.take_log()
        from vmkit.memory.lines import strip_levels  # noqa: PLC0415  (see _take_log)

        return tail_lines(strip_levels(log), lines)

    def _take_log(self, fd: int) -> bytes:
        # Few logs are read, and a restored guest is ready before these modules are.
        from vmkit.memory.guest import MemoryFile  # noqa: PLC0415
        from vmkit.memory.kernel_log import read_kernel_log  # noqa: PLC0415
        from vmkit.memory.lines import render_records  # noqa: PLC0415

        log = render_records(read_kernel_log(MemoryFile(fd, os.fstat(fd).st_size)))
        temporary = self._path.with_name(f".{self._path.name}")
        try:
            temporary.write_bytes(log)
            temporary.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        return log
