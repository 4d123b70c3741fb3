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

from vmkit.machine.end import End
from vmkit.machine.launch import LaunchPlan

VERBS = frozenset({"stopping", "quit", "kill", "watch"})
MAX_LINE_BYTES = 4096
MAX_ASKERS = 64


def parse_request(line: bytes) -> str | None:
    """The verb of a request line, or None when it is no request."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    verb = value.get("do") if isinstance(value, dict) else None
    return verb if isinstance(verb, str) and verb in VERBS else None


def render_end(end: End) -> bytes:
    """The last line every asker gets."""
    return json.dumps({"end": end.reason, "brief": end.brief, "expected": end.expected}).encode() + b"\n"


class ControlServer:
    """Serves the control socket of one machine."""

    def __init__(self, plan: LaunchPlan, on_verb: Callable[[str], None]) -> None:
        self._plan = plan
        self._on_verb = on_verb
        self._askers: set[asyncio.StreamWriter] = set()

    async def serve(self, listener: socket.socket) -> None:
        """Until cancelled."""
        server = await asyncio.start_unix_server(self._serve_asker, sock=listener, limit=MAX_LINE_BYTES)
        async with server:
            await server.serve_forever()

    def announce_end(self, end: End) -> None:
        """Tells everyone connected how it ended."""
        for writer in self._askers:
            writer.write(render_end(end))

    async def close(self) -> None:
        """Lets the last words out, then closes."""
        for writer in list(self._askers):
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)
            writer.close()

    async def _serve_asker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._askers) >= MAX_ASKERS:
            writer.close()
            return
        self._askers.add(writer)
        try:
            while line := await reader.readline():
                verb = parse_request(line)
                if verb is None:
                    writer.write(b'{"error": "unknown request"}\n')
                    continue
                writer.write(b'{"ok": true}\n')
                self._on_verb(verb)
        except (OSError, ValueError):
            # A line over the limit is a ValueError of readline: whoever sends that is not a client of ours.
            pass
        finally:
            self._askers.discard(writer)
            writer.close()
