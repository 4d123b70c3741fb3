"""The process that a machine ends with."""

import asyncio
import os
from collections.abc import Callable


class MachineOwner:
    """Watches one process, or none. Invariant: `_fd` is its pidfd, and ours."""

    def __init__(self, fd: int | None, on_gone: Callable[[], None]) -> None:
        """fd: a pidfd of the process; None: there is none."""
        self._fd = fd
        self._on_gone = on_gone

    def watch(self) -> None:
        """Calls on_gone at the end of the process."""
        if self._fd is not None:
            asyncio.get_running_loop().add_reader(self._fd, self._note_end, self._fd)

    def adopt(self, pid: int) -> None:
        """The machine ends with this process from here on, or with none for 0. Raises OSError."""
        new = os.pidfd_open(pid) if pid else None
        if self._fd is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._fd = new
        self.watch()

    def _note_end(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        self._on_gone()
