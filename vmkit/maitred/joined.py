"""Joins what HTTP/2 writes at once: the head, the message and the end of an answer leave in one piece.

grpclib writes each frame by itself. Over an emulated vsock each write is a message, and wakes the peer once more. Both
sides use it.
"""

import asyncio
from collections.abc import Callable
from typing import Any, cast


class JoinedWrites:
    """A transport that sends once in a turn of the loop. Invariant: a turn is asked for while `_waiting` has bytes."""

    def __init__(self, transport: asyncio.Transport, call_soon: Callable[[Callable[[], None]], object]) -> None:
        """call_soon: of the loop that the transport is of."""
        self._transport = transport
        self._call_soon = call_soon
        self._waiting: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Sends data with all else that is written in this turn."""
        if not data:
            return
        if not self._waiting:
            self._call_soon(self.flush)
        self._waiting.append(data)

    def flush(self) -> None:
        """Sends what waits."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Closes the connection behind what waits."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        """All else is the transport's."""
        return getattr(self._transport, name)


def join_writes(transport: asyncio.BaseTransport) -> asyncio.Transport:
    """The same transport, which sends bytes, with its writes joined. Call it in the loop."""
    sending = cast("asyncio.Transport", transport)
    return cast("asyncio.Transport", JoinedWrites(sending, asyncio.get_running_loop().call_soon))
