"""Opens a connection to the guest without holding up the monitor: in a thread. Opens it again when it breaks."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NoReturn

from vsh.errors import ConnectionLost, Unreachable

# After a connection that broke, and one that did not come.
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 30.0
STOPPED_POLL_S = 1.0


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


async def keep_connected(follow: Callable[[], Awaitable[None]], is_stopped: Callable[[], bool]) -> NoReturn:
    """Awaits follow(), which uses one connection to its end, again and again, with a growing pause after failures.

    is_stopped: whether the guest's processors stand still; then it waits. Raises what follow() raises, but
    ConnectionLost and Unreachable.
    """
    pause_s = RETRY_FIRST_S
    while True:
        while is_stopped():
            await asyncio.sleep(STOPPED_POLL_S)
        try:
            await follow()
            pause_s = RETRY_FIRST_S
        except (ConnectionLost, Unreachable):
            pause_s = min(RETRY_MAX_S, pause_s * 2)
        await asyncio.sleep(pause_s)
