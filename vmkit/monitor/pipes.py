"""Reads a pipe to its end. What is done with the bytes is done in a thread: a disk may be slow."""

import asyncio
import os
from collections.abc import Callable

READ_BYTES = 1 << 20


async def read_pipe(fd: int, work: Callable[[bytes], None], data: bytes = b"") -> None:
    """Calls work with each piece. Closes the pipe at its end, when work raises, and when it is cancelled.

    data: what was read of it already. fd may be a socket, too.
    """
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader(limit=READ_BYTES)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(fd, "rb", buffering=0)
    )
    try:
        while data or (data := await stream.read(READ_BYTES)):
            job = asyncio.create_task(asyncio.to_thread(work, data))
            try:
                await asyncio.shield(job)
            finally:
                # A thread cannot be cancelled, and it must not use another file of the same number.
                await asyncio.gather(job, return_exceptions=True)
            data = b""
    finally:
        transport.close()
