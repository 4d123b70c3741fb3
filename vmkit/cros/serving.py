"""The services over gRPC, by grpclib: who may connect how often, how much one may send, and what becomes of it.

Every byte is the guest's, and of any program in it. A connection that breaks a limit is closed. Lines above the rate
are dropped, and counted.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.const import Handler as Method
from grpclib.exceptions import GRPCError
from grpclib.protocol import H2Protocol
from grpclib.server import Server, Stream

from vmkit.cros.messages import COLLECT_KERNEL_LOGS, COLLECT_USER_LOGS, VM_READY, LogRequest
from vmkit.cros.notes import DROPPED, make_line
from vmkit.cros.notes import VM_READY as READY_NOTE
from vmkit.maitred.codec import Codec
from vmkit.maitred.messages import EmptyMessage
from vshd.carry.records import LogRecord
from vshd.wire.errors import RemoteProtocolError

# ChromeOS's vm_syslog sends 4 KiB in a call, and a call of gRPC has 4 MiB at most.
CALL_BYTES_MAX = 1 << 20
# What a client may leave unread of our answers.
UNREAD_BYTES_MAX = 1 << 18
# A guest has one vm_syslog and one maitred.
CONNECTIONS_MAX = 8
# h2 takes 64 KiB as the least.
WINDOW_BYTES = 1 << 16
# Each connection's bytes: so many at once, and then so many a second. A client that is faster waits.
BURST_BYTES, BYTES_A_SECOND = 1 << 20, 1 << 18
# Of all clients together.
BURST_LINES, LINES_A_SECOND = 20_000, 2000
# Of lines that were dropped, one note in this time.
TELL_S = 1.0

Note = Callable[[LogRecord], None]


class RateBudget:
    """So many at once, and then so many a second. Invariant: `_left` is at most `_burst`."""

    def __init__(self, burst: int, a_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._a_second = a_second
        self._clock = clock
        self._left = float(burst)
        self._seen_s = clock()

    def take(self, count: int) -> float:
        """Takes them in any case. Returns how many seconds they are early; 0 where they are not."""
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._seen_s) * self._a_second) - count
        self._seen_s = now_s
        return max(0.0, -self._left / self._a_second)

    def try_take(self, count: int) -> int:
        """Takes as many of them as are there; how many."""
        self.take(0)
        taken = max(0, min(count, int(self._left)))
        self._left -= taken
        return taken


class HostAgent:
    """Both services. note: takes what the monitor is to know."""

    def __init__(self, note: Note, lines: RateBudget) -> None:
        self._note = note
        self._lines = lines
        self._dropped = 0
        self._telling: asyncio.TimerHandle | None = None

    def __mapping__(self) -> dict[str, Method]:
        unary = Cardinality.UNARY_UNARY
        return {
            COLLECT_USER_LOGS: Method(self._collect, unary, LogRequest, EmptyMessage),
            COLLECT_KERNEL_LOGS: Method(self._refuse, unary, LogRequest, EmptyMessage),
            VM_READY: Method(self._report_ready, unary, EmptyMessage, EmptyMessage),
        }

    async def _collect(self, stream: "Stream[Any, Any]") -> None:
        request = await _receive(stream)
        try:
            records = request.read_records()
        except RemoteProtocolError as error:
            raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
        records = [record for record in records if record.content]
        taken = self._lines.try_take(len(records))
        now_ns = time.time_ns()
        for record in records[:taken]:
            self._note(make_line(record, now_ns))
        self._drop(len(records) - taken)
        await stream.send_message(EmptyMessage())

    async def _refuse(self, _stream: "Stream[Any, Any]") -> None:
        # As ChromeOS does.
        raise GRPCError(Status.UNIMPLEMENTED, "the kernel's log is read in another way")

    async def _report_ready(self, stream: "Stream[Any, Any]") -> None:
        await _receive(stream)
        self._note(LogRecord(READY_NOTE, 0, b"", time_ns=time.time_ns()))
        await stream.send_message(EmptyMessage())

    def _drop(self, count: int) -> None:
        self._dropped += count
        if self._dropped and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._note(LogRecord(DROPPED, self._dropped, b"", time_ns=time.time_ns()))
        self._dropped = 0


async def _receive(stream: "Stream[Any, Any]") -> Any:
    request = await stream.recv_message()
    if request is None:
        raise GRPCError(Status.INVALID_ARGUMENT, "the call has no message")
    return request


class HostServer(Server):
    """Invariant: at most CONNECTIONS_MAX connections are open, the latest ones."""

    def __init__(self, agent: HostAgent) -> None:
        windows = Configuration(http2_connection_window_size=WINDOW_BYTES, http2_stream_window_size=WINDOW_BYTES)
        super().__init__([agent], codec=Codec(), config=windows)
        self._open: list[BoundedProtocol] = []

    def _protocol_factory(self) -> H2Protocol:
        made = super()._protocol_factory()
        return BoundedProtocol(self, made)

    def note_open(self, protocol: "BoundedProtocol") -> None:
        """One is connected."""
        self._open.append(protocol)
        if len(self._open) > CONNECTIONS_MAX:
            self._open.pop(0).abort()

    def note_closed(self, protocol: "BoundedProtocol") -> None:
        """One has gone."""
        if protocol in self._open:
            self._open.remove(protocol)


class BoundedProtocol(H2Protocol):
    """One connection. Closes one that sends more than CALL_BYTES_MAX in a call, or what h2 cannot read."""

    def __init__(self, server: HostServer, made: H2Protocol) -> None:
        """made: what grpclib would have used."""
        super().__init__(made.handler, made.config, made.h2_config)
        self._server = server
        self._bytes = RateBudget(BURST_BYTES, BYTES_A_SECOND)
        self._waiting: asyncio.TimerHandle | None = None
        self._of_call = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        super().connection_made(transport)
        self._server.note_open(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.note_closed(self)
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if not self.processor.streams:
            self._of_call = 0
        self._of_call += len(data)
        if self._of_call > CALL_BYTES_MAX or self._transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self.abort()
            return
        try:
            super().data_received(data)
        except Exception:
            self.abort()
            return
        early_s = self._bytes.take(len(data))
        if early_s and self._waiting is None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._waiting = asyncio.get_running_loop().call_later(early_s, self._go_on)

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _go_on(self) -> None:
        self._waiting = None
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


async def serve(listening: Sequence[socket.socket], note: Note, lines: RateBudget | None = None) -> None:
    """Serves at listening sockets until it is cancelled."""
    # Its words are about what a guest did wrong, with tracebacks.
    logging.getLogger("grpclib").setLevel(logging.CRITICAL + 1)
    agent = HostAgent(note, lines or RateBudget(BURST_LINES, LINES_A_SECOND))
    servers = []
    for sock in listening:
        sock.setblocking(False)
        # Each counts its own connections, so that no flood at one port keeps a client from the other.
        server = HostServer(agent)
        await server.start(sock=sock)
        servers.append(server)
    try:
        await asyncio.Event().wait()
    finally:
        for server in servers:
            server.close()
