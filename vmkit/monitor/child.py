"""Children of the monitor (QEMU, companions): started so that they cannot outlive it, ended within a deadline."""

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from typing import BinaryIO

from vmkit.errors import HostError
from vmkit.monitor.logs import CappedLog
from vsh.text import tail_lines

# prctl(2), <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

TERM_DEADLINE_S = 2.0
KILL_DEADLINE_S = 5.0
# What is kept of its output to explain its end.
TAIL_LINES = 20
TAIL_BYTES = 16 * 1024
READ_BYTES = 4096
# The output is at its end as soon as the process is, unless a child of it has inherited the pipe.
OUTPUT_DEADLINE_S = 1.0


def _die_with_parent(parent_pid: int) -> Callable[[], None]:
    """A preexec hook: SIGKILL for the child when the monitor dies, by whatever cause."""

    def hook() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died between fork and prctl; then no signal will ever come.
        if os.getppid() != parent_pid:
            os._exit(127)

    return hook


class Child:
    """One running program; its output goes to a log with a ceiling, its last lines are kept to explain its end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, output: BinaryIO, log: CappedLog | None) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log
        self._recent = b""
        self._reader = asyncio.create_task(self._read_output(output), name=f"{name}-output")

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits for its end; the output has been read then."""
        status = await self._process.wait()
        await asyncio.wait([self._reader], timeout=OUTPUT_DEADLINE_S)
        return status

    async def stop(self) -> None:
        """SIGTERM, a short deadline, SIGKILL."""
        for number, deadline_s in ((signal.SIGTERM, TERM_DEADLINE_S), (signal.SIGKILL, KILL_DEADLINE_S)):
            if self._process.returncode is not None:
                return
            self.signal(number)
            await asyncio.wait([asyncio.ensure_future(self.wait())], timeout=deadline_s)

    def signal(self, number: int) -> None:
        """Sends a signal; nothing happens when it has ended."""
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return

    def render_tail(self) -> str:
        """Its last lines of output."""
        return tail_lines(self._recent, TAIL_LINES)

    def render_end(self) -> str:
        """`status 1` or `signal 9 (SIGKILL)`."""
        status = self._process.returncode
        if status is None:
            return "still running"
        if status >= 0:
            return f"status {status}"
        try:
            return f"signal {-status} ({signal.Signals(-status).name})"
        except ValueError:
            return f"signal {-status}"

    async def _read_output(self, output: BinaryIO) -> None:
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), output)
        try:
            while data := await stream.read(READ_BYTES):
                if self._log is not None:
                    self._log.write(data)
                self._recent = (self._recent + data)[-TAIL_BYTES:]
        finally:
            transport.close()


async def start_child(
    name: str, argv: Sequence[str], *, log: CappedLog | None, pass_fds: Sequence[int], package: str = ""
) -> Child:
    """Starts a program that dies with this process; only pass_fds reach it. log: for its output; None: it is forgotten.

    Raises HostError when it cannot be started.
    """
    # A pipe of our own: with one of asyncio's the end of a process is heard only when its output is at the end, too.
    read_fd, write_fd = os.pipe()
    output = open(read_fd, "rb", buffering=0)  # noqa: PTH123, SIM115  (the Child closes it)
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_fd,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=tuple(pass_fds),
            preexec_fn=_die_with_parent(os.getpid()),
            start_new_session=True,
        )
    except OSError as error:
        output.close()
        hint = f"install it: sudo apt-get install {package}" if package else ""
        raise HostError(f"cannot start '{argv[0]}': {os.strerror(error.errno or 0)}", hint=hint) from error
    finally:
        os.close(write_fd)
    return Child(name, process, output, log)
