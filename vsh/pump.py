"""Runs a session: bytes from a source to the target's stdin, its output to sinks, until it has exited.

Owns the poll loop. A source or sink is a descriptor or memory (vsh.stdio, vsh.memory). A stalled one holds up only
itself. Bulk between descriptors goes through conduits, as in vshd. Of terminals and signals it knows only that a
descriptor may announce them.
"""

import errno
import select
import time

from vsh.errors import VshError
from vsh.session import Session
from vsh.transport import remaining_ms
from vshd.carry.conduit import SPLICE_SIZE, Conduit, Sluice, open_conduit, open_sluice
from vshd.wire import messages
from vshd.wire.events import Data, EndOfStream, Event, Exited, StreamClosed
from vshd.wire.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    # At run time this import would cost more than the pump.
    from collections.abc import Callable

# Without credit, output that a sink does not take is kept up to here; then the connection is not read any more.
LEGACY_SINK_CEILING = 1 << 20
# 16 legacy frames: one writev().
LEGACY_READ_SIZE = 16 * 4000

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Source:
    """The source of stdin. `fd` is the descriptor to poll, -1 when the source is always ready."""

    fd = -1
    # read() is not called with less.
    room_min = 1
    # True when bulk comes from it; then pass_to() may be called.
    is_bulk = False

    def read(self, limit: int) -> "bytes | memoryview | None":
        """Returns at most `limit` bytes, valid until the next call; empty at the end, None when none are ready."""
        raise NotImplementedError

    def pass_to(self, sluice: Sluice, limit: int) -> int | None:
        """Moves at most `limit` bytes into a sluice; returns how many, 0 at the end, None when none are ready."""
        raise NotImplementedError

    @property
    def is_held(self) -> bool:
        """Whether the source must not be read now. A later call may return False."""
        return False

    @property
    def look_s(self) -> float | None:
        """In how many seconds `is_held` must be called again; None: not before the next event."""
        return None

    def close(self) -> None:
        """Closes the source: the target takes no more."""


class Sink:
    """The sink of an output. `fd` is the descriptor to poll, -1 when the sink is always ready."""

    fd = -1
    # Whether take_from() may be called.
    is_spliceable = False

    def write(self, pieces: "list[memoryview | bytes]") -> int:
        """Takes as many bytes as it can now, and returns how many. Raises OSError when it can never take any again."""
        raise NotImplementedError

    def take_from(self, conduit: Conduit, limit: int) -> int:
        """Does the same for bytes in a conduit. OSError with EINVAL: only write() can give it these bytes."""
        raise NotImplementedError

    def close(self) -> None:
        """Closes the sink: the stream has ended."""


class Outlet:
    """A sink with the bytes that wait for it. Invariant: `pending` is empty once the sink is gone. Those of its bytes
    that are elsewhere are in `conduit`; bulk passes through it while `is_passing`.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.pending = Output()
        self.is_ending = False
        self.is_gone = False
        self.is_passing = False
        self.conduit: Conduit | None = None

    def close_conduit(self) -> None:
        """Closes the conduit. The caller has drained its bytes, or gives them up."""
        self.is_passing = False
        if self.conduit is not None:
            self.conduit.close()
            self.conduit = None


class SinkGone(VshError):  # noqa: N818 - it names what happened
    """A sink broke, and the protocol cannot report this to the target: the session is over.

    For a pipe without a reader the status is that of SIGPIPE, and the message is empty.
    """


class TimedOut(VshError):  # noqa: N818 - it names what happened
    """The session lasted longer than its timeout, and was ended."""

    # timeout(1)'s.
    status = 124


class Pump:
    """Invariant: `exit` is set once the target has ended. The pump is done when the outlets have drained, too."""

    def __init__(self, session: Session, source: Source, sinks: dict[int, Sink], *, has_pty: bool = False) -> None:
        self.session = session
        self.source: Source | None = source
        self.outlets = {stream: Outlet(sink) for stream, sink in sinks.items()}
        self.exit: Exited | None = None
        self.has_pty = has_pty
        self.wakeup_fd = -1
        self.on_wakeup: Callable[[], None] | None = None
        # What becomes of the target when the time is over; empty: it ends.
        self.parting = ""
        self._poll = select.poll()
        self._masks: dict[int, int] = {}
        # Bulk of the source on its way to the connection.
        self._sluice: Sluice | None = None
        self._can_pass = session.can_pass

    def run(self, deadline_s: float | None = None) -> Exited:
        """Pumps until the target has exited and its output is delivered.

        deadline_s: of time.monotonic(). Raises ConnectionLost, SinkGone, TimedOut, and the errors of sources and sinks.
        """
        try:
            return self._run(deadline_s)
        finally:
            for outlet in self.outlets.values():
                outlet.close_conduit()
            if self._sluice is not None:
                self._sluice.close()
                self._sluice = None

    def _run(self, deadline_s: float | None) -> Exited:
        while self.exit is None or any(outlet.pending.size for outlet in self.outlets.values()):
            if self.session.has_early:
                self._receive()
            self._read_source_if_ready()
            self.session.flush()
            for fd, mask in self._wait(deadline_s):
                self._serve(fd, mask)
        return self.exit

    # Readiness.

    def _wait(self, deadline_s: float | None) -> list[tuple[int, int]]:
        if self.session.has_early or (self.exit is not None and not any(o.pending.size for o in self.outlets.values())):
            return []
        silence_s = None if self.exit is not None else self.session.check_peer()
        timeout_ms = None if silence_s is None else silence_s * 1000 + 1
        if deadline_s is not None:
            left_ms = remaining_ms(deadline_s)
            if not left_ms:
                raise TimedOut("the command did not end in time", hint=self._describe_parting())
            timeout_ms = left_ms if timeout_ms is None else min(left_ms, timeout_ms)
        if self._is_source_ready():
            timeout_ms = 0
        elif self.source is not None and (look_s := self.source.look_s) is not None:
            timeout_ms = look_s * 1000 if timeout_ms is None else min(look_s * 1000, timeout_ms)
        self._want_all()
        return self._poll.poll(timeout_ms)

    def _describe_parting(self) -> str:
        if self.parting:
            return self.parting
        if self.session.connection.output.size:
            return f"{self.session.name} has not read all that was sent: the processes may still run in the guest"
        return "the connection is closed; the guest's vshd ends the processes"

    def _want_all(self) -> None:
        self._want(self.wakeup_fd, select.POLLIN)
        session = self.session
        is_reading = session.connection.is_extended or not self._is_any_outlet_full()
        mask = (select.POLLIN if is_reading else 0) | (select.POLLOUT if session.connection.output.size else 0)
        self._want(session.fd, mask if self.exit is None else 0)
        source = self.source
        if source is not None:
            is_wanted = self.exit is None and not source.is_held and self._stdin_room() > 0
            self._want(source.fd, select.POLLIN if is_wanted else 0)
        for outlet in self.outlets.values():
            self._want(outlet.sink.fd, select.POLLOUT if outlet.pending.size else 0)

    def _want(self, fd: int, mask: int) -> None:
        """Polls `fd` for `mask`. Does not poll it for an empty mask, since poll() would still report its errors."""
        if fd < 0 or self._masks.get(fd, 0) == mask:
            return
        if mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask
        else:
            self._poll.unregister(fd)
            del self._masks[fd]

    def _is_any_outlet_full(self) -> bool:
        return any(outlet.pending.size >= LEGACY_SINK_CEILING for outlet in self.outlets.values())

    def _serve(self, fd: int, mask: int) -> None:
        if fd == self.wakeup_fd and self.on_wakeup is not None:
            self.on_wakeup()
        if fd == self.session.fd and mask & (select.POLLIN | _ERRORS) and self.exit is None:
            self._receive()
        if self.source is not None and fd == self.source.fd and mask & (select.POLLIN | _ERRORS):
            if self.has_pty and self.on_wakeup is not None:
                # poll() may return what was typed after a resize before the handler of its signal has run.
                self.on_wakeup()
            if self.source is not None:
                self._read_source(self.source)
        if mask & (select.POLLOUT | _ERRORS):
            for stream, outlet in self.outlets.items():
                if outlet.sink.fd == fd and outlet.pending.size:
                    self._drain(stream, outlet)

    # Towards the target.

    def _stdin_room(self) -> int:
        connection = self.session.connection
        # What was read last may still be on its way; until then its buffer must not be used again.
        is_free = not connection.output.size and not self.session.is_mute
        room = connection.send_room(messages.STDIN) if is_free else 0
        return room if self.source is not None and room >= self.source.room_min else 0

    def _is_source_ready(self) -> bool:
        return self.exit is None and self.source is not None and self.source.fd < 0 and self._stdin_room() > 0

    def _read_source_if_ready(self) -> None:
        if self.source is not None and self._is_source_ready():
            self._read_source(self.source)

    def _read_source(self, source: Source) -> None:
        connection = self.session.connection
        limit = connection.max_data if connection.is_extended else LEGACY_READ_SIZE
        room = min(self._stdin_room(), limit)
        if not room:
            return
        sluice = self._find_sluice() if source.is_bulk else None
        if sluice is not None:
            size = source.pass_to(sluice, room)
            if size is None:
                return
            if size:
                sluice.append_to(connection.output, connection.begin_data(messages.STDIN, size))
                return
        else:
            data = source.read(room)
            if data is None:
                return
            if data:
                connection.send_data(messages.STDIN, data)
                return
        connection.send_end(messages.STDIN)
        self._close_source()

    def _find_sluice(self) -> Sluice | None:
        """Returns the sluice, or None without one. It is empty: no source is read while bytes are in it."""
        if self._sluice is None and self._can_pass:
            self._sluice = open_sluice()
            self._can_pass = self._sluice is not None
        return self._sluice

    def _close_source(self) -> None:
        if self.source is not None:
            self._want(self.source.fd, 0)
            self.source.close()
            self.source = None

    # From the target.

    def _receive(self) -> None:
        """Receives once. When that brought a large frame's head, takes the part of the rest that has come."""
        if not self._take_bulk():
            self._receive_events()
            self._take_bulk()

    def _take_bulk(self) -> bool:
        """Moves the next bytes of a large frame past this process's memory; False when receive() must be called."""
        for stream, outlet in self.outlets.items():
            if outlet.is_passing and outlet.conduit is not None:
                taken = self.session.take_bulk(stream, outlet.conduit)
                if taken:
                    outlet.pending.append_elsewhere(outlet.conduit, taken)
                    if outlet.pending.size == taken:
                        self._drain(stream, outlet)
                    return True
        return False

    def _receive_events(self) -> None:
        events = self.session.receive(is_passing=any(outlet.is_passing for outlet in self.outlets.values()))
        for stream in self.outlets:
            pieces: list[memoryview | bytes] = [
                event.data for event in events if isinstance(event, Data) and event.stream == stream
            ]
            if pieces:
                self._deliver(stream, pieces)
        for event in events:
            self._handle(event)
        self._secure_pending()

    def _secure_pending(self) -> None:
        """Copies the bytes that wait for a sink, so that they survive the next receive."""
        borrowing = [outlet.pending for outlet in self.outlets.values() if outlet.pending.is_borrowing]
        if borrowing:
            self.session.buffers.secure(*borrowing)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Data):
            if event.stream not in self.outlets:
                self.session.connection.consumed(event.stream, len(event.data))
        elif isinstance(event, EndOfStream):
            outlet = self.outlets.get(event.stream)
            if outlet is not None:
                outlet.is_ending = True
                self._close_drained(outlet)
        elif isinstance(event, StreamClosed):
            self._close_source()
        elif isinstance(event, Exited):
            self.session.check(event)
            self.exit = event
            self._close_source()
        else:
            self.session.check(event)

    def _deliver(self, stream: int, pieces: "list[memoryview | bytes]") -> None:
        """Gives pieces of the receive buffer to a sink. The bytes that it does not take now wait."""
        outlet = self.outlets[stream]
        if outlet.is_gone:
            self.session.connection.consumed(stream, sum(map(len, pieces)))
            return
        before = outlet.pending.size
        for piece in pieces:
            outlet.pending.append(piece)
        received = outlet.pending.size - before
        if not before:
            self._drain(stream, outlet)
        if received >= SPLICE_SIZE and outlet.sink.is_spliceable and not outlet.is_passing:
            self._begin_passing(outlet)

    def _begin_passing(self, outlet: Outlet) -> None:
        if self._can_pass and not outlet.is_gone:
            outlet.conduit = outlet.conduit or open_conduit()
            outlet.is_passing = outlet.conduit is not None
            self._can_pass = outlet.is_passing

    def _drain(self, stream: int, outlet: Outlet) -> None:
        pending = outlet.pending
        while pending.size:
            turn = pending.elsewhere
            try:
                if turn is None:
                    taken = outlet.sink.write(pending.buffers())
                else:
                    assert isinstance(turn.place, Conduit)
                    taken = outlet.sink.take_from(turn.place, turn.size)
            except OSError as error:
                if turn is not None and error.errno == errno.EINVAL:
                    # The device cannot be spliced to. Only the bytes that are in the conduit already go this way.
                    outlet.is_passing = outlet.sink.is_spliceable = False
                    assert isinstance(turn.place, Conduit)
                    pending.bring(turn.place.read(turn.size))
                    continue
                self._lose(stream, outlet, error)
                return
            if not taken:
                return
            pending.sent(taken)
            self.session.connection.consumed(stream, taken)
        self._close_drained(outlet)

    def _close_drained(self, outlet: Outlet) -> None:
        if outlet.is_ending and not outlet.pending.size and not outlet.is_gone:
            self._want(outlet.sink.fd, 0)
            outlet.sink.close()

    def _lose(self, stream: int, outlet: Outlet, error: OSError) -> None:
        """Gives up an output whose reader is gone: the target sees a closed pipe (2.5), or the session ends."""
        outlet.is_gone = True
        outlet.pending.clear()
        outlet.close_conduit()
        if not isinstance(error, BrokenPipeError):
            raise SinkGone(f"cannot write {messages.STREAM_NAMES[stream]}: {error.strerror}") from error
        if self.has_pty or not self.session.connection.is_extended:
            # Upstream's client dies of SIGPIPE here.
            raise SinkGone("", status=128 + 13) from error
        self.session.connection.close_stream(stream)


def deadline_after(timeout_s: float | None) -> float | None:
    """Returns the deadline of a wait that starts now."""
    return None if timeout_s is None else time.monotonic() + timeout_s
