"""The monitor's control socket: JSON lines, one word asks, every asker hears the end.

Verbs: `stopping` (an end is expected from now on), `quit` and `kill` (end it), `watch` (only listen). Each is
answered by {"ok": true}; when the machine ends, everyone connected gets {"end": reason, "brief": ..., "expected":
...} and then the connection closes.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

from vmkit.monitor.end import End

VERBS = frozenset({"stopping", "quit", "kill", "watch"})
MAX_LINE_BYTES = 4096
MAX_ASKERS = 64
# Askers that do not read what they asked for are not waited for.
LAST_WORDS_DEADLINE_S = 1.0


def parse_request(line: bytes) -> str | None:
    """The verb of a request line, or None when it is no request."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    verb = value.get("do") if isinstance(value, dict) else None
    return verb if isinstance(verb, str) and verb in VERBS else None


def render_end(end: End) -> bytes:
    """The last line every asker gets."""
    return json.dumps({"end": end.reason, "brief": end.brief, "expected": end.expected}).encode() + b"\n"


class ControlServer:
    """Serves the control socket of one machine."""

    def __init__(self, on_verb: Callable[[str], None]) -> None:
        self._on_verb = on_verb
        self._askers: set[asyncio.StreamWriter] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Until cancelled."""
        server = await asyncio.start_unix_server(self._serve_asker, sock=listener, limit=MAX_LINE_BYTES)
        try:
            # Not serve_forever: from Python 3.12 on its end waits for every connection, and askers wait for ours.
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()

    def announce_end(self, end: End) -> None:
        """Tells everyone connected how it ended."""
        for writer in self._askers:
            writer.write(render_end(end))

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
                verb = parse_request(line)
                if verb is not None:
                    self._on_verb(verb)
                writer.write(b'{"ok": true}\n' if verb else b'{"error": "unknown request"}\n')
                # Who asks without reading waits here.
                await writer.drain()
        except (OSError, ValueError):
            # A line over the limit is a ValueError of readline: whoever sends that is not a client of ours.
            pass
        finally:
            self._askers.discard(writer)
            writer.close()
