"""Programs that maitred starts for the host: once, waited for, or again and again.

As ChromeOS has it: root's, in a session of their own, with PATH and the request's variables. Waiting for one never
keeps the server from anything else.
"""

import asyncio
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence

from vmkit.maitred.messages import EXITED, FAILED, LAUNCHED, SIGNALED

PATH = b"/usr/bin:/usr/sbin:/bin:/sbin"
CONSOLE = "/dev/console"
UMASK = 0o022
# A program that ends is started again at most so often in the period; then it is given up until it is launched anew.
RESPAWN_MAX = 10
RESPAWN_PERIOD_S = 30.0


class Processes:
    """Invariant: `_watched` has a task for each program that runs and that no call waits for."""

    def __init__(self) -> None:
        self._watched: set[asyncio.Task[None]] = set()
        self._respawned = 0

    @property
    def is_needed(self) -> bool:
        """A program is to be started again, which ends with this process."""
        return self._respawned > 0

    async def launch(
        self,
        argv: Sequence[bytes],
        env: Mapping[bytes, bytes],
        *,
        respawn: bool = False,
        use_console: bool = False,
        wait_for_exit: bool = False,
    ) -> tuple[int, int]:
        """Starts a program; the status, and the code where it was waited for. Raises ValueError for a NUL byte."""
        try:
            process = _start(argv, env, use_console=use_console)
        except OSError:
            return FAILED, 0
        if wait_for_exit:
            code = await _wait(process)
            return (EXITED, code) if code >= 0 else (SIGNALED, -code)
        keeping = self._keep(process, argv, env, use_console=use_console) if respawn else _reap(process)
        self._respawned += respawn
        task = asyncio.get_running_loop().create_task(keeping)
        self._watched.add(task)
        task.add_done_callback(self._watched.discard)
        return LAUNCHED, 0

    async def _keep(
        self,
        process: "subprocess.Popen[bytes]",
        argv: Sequence[bytes],
        env: Mapping[bytes, bytes],
        *,
        use_console: bool,
    ) -> None:
        clock = asyncio.get_running_loop()
        starts_s = deque([clock.time()])
        try:
            while True:
                await _wait(process)
                now_s = clock.time()
                while starts_s and now_s - starts_s[0] >= RESPAWN_PERIOD_S:
                    starts_s.popleft()
                if len(starts_s) >= RESPAWN_MAX:
                    return
                starts_s.append(now_s)
                try:
                    process = _start(argv, env, use_console=use_console)
                except OSError:
                    return
        finally:
            self._respawned -= 1


def _start(argv: Sequence[bytes], env: Mapping[bytes, bytes], *, use_console: bool) -> "subprocess.Popen[bytes]":
    """Raises OSError where it cannot be executed."""
    stream = os.open(CONSOLE, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC) if use_console else subprocess.DEVNULL
    try:
        return subprocess.Popen(
            list(argv),
            stdin=stream,
            stdout=stream,
            stderr=stream,
            env={b"PATH": PATH, **env},
            cwd="/",
            start_new_session=True,
            umask=UMASK,
        )
    finally:
        if use_console:
            os.close(stream)


async def _reap(process: "subprocess.Popen[bytes]") -> None:
    await _wait(process)


async def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Until the program ends; its status, negative for a signal."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(process.pid)
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return process.wait()
