"""The monitor's control socket: serves the requests of vmkit.machine.words, and sends every asker the machine's
reboots and end.

Owns the connections. Knows nothing of what a request does: the monitor is called with each, and returns the answer.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from vmkit.machine.words import (
    MAX_REQUEST_LINE_BYTES,
    Answer,
    Ended,
    Rebooted,
    Request,
    WordError,
    parse_request,
    render_answer,
    render_end,
    render_reboot,
)

MAX_ASKERS = 64
# Askers that do not read what they asked for are not waited for.
LAST_WORDS_DEADLINE_S = 1.0


class ControlServer:
    """Serves the control socket of one machine."""

    def __init__(self, on_request: Callable[[Request], Awaitable[Answer]]) -> None:
        self._on_request = on_request
        self._askers: set[asyncio.StreamWriter] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Until cancelled."""
        server = await asyncio.start_unix_server(self._serve_asker, sock=listener, limit=MAX_REQUEST_LINE_BYTES)
        try:
            # Not serve_forever: from Python 3.12 on its end waits for every connection, and askers wait for ours.
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()

    def announce_end(self, ended: Ended) -> None:
        """Sends everyone connected how the machine ended."""
        self._announce(render_end(ended))

    def announce_reboot(self, rebooted: Rebooted) -> None:
        """Sends everyone connected that the guest boots again."""
        self._announce(render_reboot(rebooted))

    def _announce(self, line: bytes) -> None:
        for writer in self._askers:
            writer.write(line)

    async def close(self) -> None:
        """Lets the last words out, then closes."""
        askers = list(self._askers)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_DEADLINE_S):
                await asyncio.gather(*(writer.drain() for writer in askers), return_exceptions=True)
        for writer in askers:
            writer.close()

    async def _serve_asker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._askers) >= MAX_ASKERS:
            writer.close()
            return
        self._askers.add(writer)
        try:
            while line := await reader.readline():
                writer.write(render_answer(await self._answer(line)))
                # A client that asks without reading waits here.
                await writer.drain()
        except (OSError, ValueError):
            # A line over the limit is a ValueError of readline: its sender is not a client of ours.
            pass
        finally:
            self._askers.discard(writer)
            writer.close()

    async def _answer(self, line: bytes) -> Answer:
        try:
            request = parse_request(line)
        except WordError as error:
            return Answer(False, str(error))
        return await self._on_request(request)
