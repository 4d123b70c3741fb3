"""Opens a connection to the guest without holding up the monitor: in a thread."""

import asyncio
import os
from collections.abc import Callable


async def connect(open_: Callable[[], tuple[int, bytes]]) -> tuple[int, bytes]:
    """Returns what open_ returns: a connection, which the caller closes, and what of it was read already.

    One that comes after this was cancelled is closed. Raises what open_ raises, VshError.
    """
    job = asyncio.create_task(asyncio.to_thread(open_))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        # A thread cannot be cancelled.
        (done,) = await asyncio.gather(job, return_exceptions=True)
        if isinstance(done, tuple):
            os.close(done[0])
        raise
