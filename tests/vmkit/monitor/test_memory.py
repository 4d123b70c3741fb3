"""The guest's memory: its size, and who has its descriptor for how long."""

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import pytest

from vmkit.monitor.memory import GuestMemory

SIZE_BYTES = 1 << 20


def test_memory_that_gets_its_size_can_be_filled_and_keeps_the_size(tmp_path: Path) -> None:
    async def run() -> None:
        memory = GuestMemory(tmp_path / "kernel.log")
        memory.set_size(SIZE_BYTES)
        assert await memory.use(lambda fd: os.pwrite(fd, b"page", SIZE_BYTES - 4)) == 4
        for size_bytes in (SIZE_BYTES - 1, SIZE_BYTES + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fd, size_bytes)
        # QEMU sets the size that the file has.
        os.ftruncate(memory.fd, SIZE_BYTES)
        await memory.close()

    asyncio.run(run())


def test_memory_stays_open_until_cancelled_work_has_ended(tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    size_bytes: list[int] = []

    def work(fd: int) -> None:
        begun.set()
        assert goes_on.wait(20)
        size_bytes.append(os.fstat(fd).st_size)

    async def run() -> None:
        memory = GuestMemory(tmp_path / "kernel.log")
        memory.set_size(SIZE_BYTES)
        using = asyncio.create_task(memory.use(work))
        assert await asyncio.to_thread(begun.wait, 20)
        using.cancel()
        closing = asyncio.create_task(memory.close())
        # Both get their turns, and neither ends before the thread does.
        for _ in range(10):
            await asyncio.sleep(0)
        assert not using.done() and not closing.done()
        goes_on.set()
        with contextlib.suppress(asyncio.CancelledError):
            await using
        await closing
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(memory.fd)

    asyncio.run(run())
    assert size_bytes == [SIZE_BYTES]
