"""The guest's serial console in the monitor: logs it, finds the words of a failing boot, and shows it to terminals.

The monitor is the console's one reader, so a console without a terminal never blocks the guest. Knows nothing of QEMU
or machines.
"""

import asyncio
import contextlib
import re
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vmkit.monitor.logs import CappedLog
from vsh.text import clean_line, tail_lines

READ_BYTES = 65536
# What an attaching person sees of the past, and what a failure can quote.
HISTORY_BYTES = 64 * 1024
MAX_LINE_BYTES = 4096
# An attached terminal that does not read is dropped before its backlog costs real memory.
MAX_BACKLOG_BYTES = 1024 * 1024
MAX_ATTACHED = 16
# A guest that takes no input keeps what is typed in the socket; a terminal that types on after that is dropped.
TYPE_DEADLINE_S = 30.0

_PANIC = re.compile(rb"Kernel panic - not syncing: ?(.*)")
_INIT_ERROR = re.compile(rb"vmkit-init: error: ?(.*)")


class Trouble(StrEnum):
    """What a console line can say about a boot."""

    PANIC = "panic"
    INIT_ERROR = "init-error"


@dataclass(frozen=True, slots=True)
class ConsoleTrouble:
    """The first line of a panic or of init's failure."""

    kind: Trouble
    text: str


def find_trouble(line: bytes) -> ConsoleTrouble | None:
    """Returns the trouble that a line of console output reports, if any."""
    for kind, pattern in ((Trouble.PANIC, _PANIC), (Trouble.INIT_ERROR, _INIT_ERROR)):
        match = pattern.search(line)
        if match:
            return ConsoleTrouble(kind, clean_line(match[1]))
    return None


class Console:
    """Reads one end of the console's socketpair until QEMU closes the other."""

    def __init__(self, sock: socket.socket, log: CappedLog, on_trouble: Callable[[ConsoleTrouble], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._log = log
        self._on_trouble = on_trouble
        self._history: deque[bytes] = deque()
        self._history_bytes = 0
        self._partial = b""
        self._typing = asyncio.Lock()
        self._attached: set[asyncio.StreamWriter] = set()
        self.trouble: ConsoleTrouble | None = None
        # The last of init's: it reports again when it tries again, and then gives up.
        self.init_error: ConsoleTrouble | None = None

    def renew(self, sock: socket.socket) -> None:
        """Takes the console of the next QEMU, after read_to_end(). Terminals stay, and so does the past."""
        sock.setblocking(False)
        self._sock.close()
        self._sock = sock
        self._partial = b""
        self.trouble = self.init_error = None

    async def read_to_end(self) -> None:
        """Pumps until the console closes."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._sock, READ_BYTES)
            except OSError:
                return
            if not data:
                return
            self._log.write(data)
            self._remember(data)
            self._search(data)
            self._show(data)
            # sock_recv does not wait while there is something to read: a flood must not starve everything else.
            await asyncio.sleep(0)

    def tail(self, lines: int) -> str:
        """The last lines of the console as text, control sequences of terminals removed."""
        return tail_lines(b"".join(self._history), lines)

    async def listen(self, listener: socket.socket) -> None:
        """Lets terminals attach at a listening socket, until cancelled."""
        server = await asyncio.start_unix_server(self.serve, sock=listener)
        try:
            # See ControlServer.serve.
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One attached terminal: it sees the recent past and all that comes; what it sends is typed into the guest."""
        if len(self._attached) >= MAX_ATTACHED:
            writer.close()
            return
        writer.write(b"".join(self._history))
        self._attached.add(writer)
        try:
            while data := await reader.read(READ_BYTES):
                await self._type(data)
        except OSError:
            pass
        finally:
            self._attached.discard(writer)
            writer.close()

    def close(self) -> None:
        """Lets go of QEMU's end and of everyone attached."""
        self._sock.close()
        for writer in self._attached:
            writer.close()

    async def _type(self, data: bytes) -> None:
        """Types into the guest; one terminal at a time, for the loop knows only one writer of a socket."""
        async with asyncio.timeout(TYPE_DEADLINE_S), self._typing:
            # What is typed while the guest reboots has no reader.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def _remember(self, data: bytes) -> None:
        self._history.append(data)
        self._history_bytes += len(data)
        while self._history_bytes > HISTORY_BYTES and len(self._history) > 1:
            self._history_bytes -= len(self._history.popleft())

    def _search(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-MAX_LINE_BYTES:]
        for line in lines:
            trouble = find_trouble(line)
            if trouble is None:
                continue
            if trouble.kind is Trouble.INIT_ERROR:
                self.init_error = trouble
            if self.trouble is None:
                self.trouble = trouble
                self._on_trouble(trouble)

    def _show(self, data: bytes) -> None:
        for writer in list(self._attached):
            if writer.is_closing() or writer.transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
                self._attached.discard(writer)
                writer.transport.abort()
            else:
                writer.write(data)
