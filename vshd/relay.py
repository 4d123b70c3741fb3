"""One running session: bytes between the client's connection and the target, both ways, none ever blocking another.

Owns the loop and the descriptors' readiness. Every descriptor is non-blocking, every buffer has a ceiling: in extended
mode the peer's credit, in legacy mode LEGACY_STDIN_CEILING and the transport's own back-pressure. Bulk goes through
conduits: of stdin's large frames only the heads are read here, and output's heads alone are written from here. Knows
nothing of users, programs and logs.
"""

import os
import select
import time

from vshd import processes, signals
from vshd.conduit import SPLICE_SIZE, Conduit, Sluice, enlarge_pipe, open_conduit, open_sluice, write_output
from vshd.processes import Exit
from vshd.target import Target, set_window_size
from vshd.wire import messages, state
from vshd.wire.buffers import Buffers
from vshd.wire.events import Broken, Data, EndOfStream, Event, Failed, Held, Resized, Signalled, StreamClosed
from vshd.wire.messages import Failure
from vshd.wire.output import Output
from vshd.wire.server import ServerConnection
from vshd.wire.silence import Silence

# What is read from the target at once, in steps: see vshd.wire.buffers.
CHUNK_SIZES = (1 << 13, 1 << 16)
# 16 legacy frames: one writev().
LEGACY_READ_SIZE = 16 * 4000
# A read of this much is bulk: stdio writes 4096 at a time, a terminal gives 4095.
BURST_SIZE = 4000
# A receive of this much is bulk, and so many may follow one another; then signals and output have their turn.
BULK_PIECE = 1 << 14
RECEIVES_AT_ONCE = 8
# Without credit, stdin for a target that does not read is kept up to here; then the connection is not read any more.
LEGACY_STDIN_CEILING = 1 << 20
# A pipe starts with 64 KiB; one that is filled at once gets this, so that fewer and larger frames leave.
PIPE_SIZE = 1 << 18
CTRL_D = b"\x04"

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Relay:
    """Invariant: a stream's descriptor is -1 once it is closed; `pending` holds stdin that the target has not taken."""

    def __init__(self, fd: int, connection: ServerConnection, target: Target, wakeup: signals.Wakeup) -> None:
        """wakeup: has this process's SIGCHLD and SIGTERM."""
        self.fd = fd
        self.connection = connection
        self.target = target
        self.wakeup = wakeup
        self.exit: Exit | None = None
        # Why the session ended before the target did; empty while it has not.
        self.lost = ""
        # Why the client did not get all that the ended target had said; empty if it did.
        self.undelivered = ""
        self.pending = Output()
        self.is_stdin_ending = False
        self._can_enlarge_stdin = not target.has_pty
        # Bulk of stdin on its way to the target; None until there is some, and where it is better copied.
        self._inlet: Conduit | None = None
        self.stdin = target.stdin
        self.sources = {messages.STDOUT: target.stdout}
        if target.stderr >= 0:
            self.sources[messages.STDERR] = target.stderr
        self._buffers = Buffers()
        # One chunk per stream; those on their way to the socket must not be read into.
        self._chunks: dict[int, memoryview] = {}
        self._sending: set[int] = set()
        # What a stream's bulk goes through instead of its chunk, while it is bulk; None where it is better copied.
        self._sluices: dict[int, Sluice | None] = {}
        self._bulky: set[int] = set()
        self._poll = select.poll()
        self._poll.register(wakeup.fd, select.POLLIN)
        self._masks: dict[int, int] = {}
        self._silence: Silence | None = None
        if connection.peer is not None and connection.limits is not None:
            self._silence = Silence(
                own_ms=connection.limits.silence_ms, peer_ms=connection.peer.silence_ms, now_s=time.monotonic()
            )

    def run(self) -> None:
        """Relays until the target has ended and all is sent, or the client is gone (`lost` says how)."""
        self._handle(self.connection.receive_data(b""))
        self._flush()
        self._look_for_exit()
        while not self.lost:
            if self._is_complete():
                self._send_exit()
                return
            for fd, mask in self._wait():
                self._serve(fd, mask)
            self._read_drained_terminal()
            self._flush()
        # A target that ended in the turn that lost the client has ended: what it left in the background lives on.
        self._look_for_exit()
        if self.exit is not None and not self.sources:
            self.undelivered, self.lost = self.lost, ""

    def close(self) -> None:
        """Closes our ends of the target's stdio; a terminal is hung up by it."""
        for fd in {self.stdin, *self.sources.values(), self.target.slave}:
            if fd >= 0:
                os.close(fd)
        self.stdin = -1
        self.sources = {}
        for conduit in (self._inlet, *self._sluices.values()):
            if conduit is not None:
                conduit.close()
        self._inlet = None
        self._sluices = {}

    # Readiness.

    def _wait(self) -> list[tuple[int, int]]:
        self._want_all()
        timeout_s = self._check_silence()
        if self._is_terminal_draining():
            timeout_s = 0
        return self._poll.poll(None if timeout_s is None else timeout_s * 1000 + 1)

    def _want_all(self) -> None:
        connection = self.connection
        is_reading = connection.is_extended or self.pending.size < LEGACY_STDIN_CEILING
        self._want(
            self.fd, (select.POLLIN if is_reading else 0) | (select.POLLOUT if connection.output.size else 0), True
        )
        if self.target.has_pty:
            if self.target.stdout >= 0:
                mask = select.POLLOUT if self.pending.size else 0
                self._want(self.target.stdout, mask | (select.POLLIN if self._can_read(messages.STDOUT) else 0), False)
            return
        if self.stdin >= 0:
            # Watched even with nothing to write: the pipe's error says that the target closed it.
            self._want(self.stdin, select.POLLOUT if self.pending.size else 0, True)
        for stream, fd in self.sources.items():
            self._want(fd, select.POLLIN if self._can_read(stream) else 0, False)

    def _want(self, fd: int, mask: int, keeps_errors: bool) -> None:
        """Polls `fd` for `mask`; for an empty one only if its errors are wanted, since poll() always reports those."""
        if not mask and not keeps_errors:
            self._forget(fd)
        elif self._masks.get(fd) != mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask

    def _can_read(self, stream: int) -> bool:
        """Output may be read: it has somewhere to go, and its chunk is free."""
        return stream in self.sources and stream not in self._sending and self.connection.send_room(stream) > 0

    def _forget(self, fd: int) -> None:
        if self._masks.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _check_silence(self) -> float | None:
        silence = self._silence
        if silence is None:
            return None
        now_s = time.monotonic()
        if silence.is_peer_lost(now_s):
            self.lost = "the client has fallen silent"
        if silence.is_word_due(now_s):
            self.connection.send_alive()
            silence.said(now_s)
            self._flush()
        return silence.wait_s(now_s)

    def _serve(self, fd: int, mask: int) -> None:
        if fd == self.fd:
            if mask & (select.POLLIN | _ERRORS):
                self._receive()
        elif fd == self.wakeup.fd:
            self._take_signals()
        elif fd == self.target.stdout and self.target.has_pty:
            if mask & select.POLLOUT:
                self._write_stdin()
            if mask & (select.POLLIN | _ERRORS):
                self._read_source(messages.STDOUT)
        elif fd == self.stdin:
            if mask & _ERRORS and not mask & select.POLLOUT:
                self._close_stdin(is_ours=False)
            else:
                self._write_stdin()
        else:
            for stream, source in list(self.sources.items()):
                if source == fd:
                    self._read_source(stream)

    # The connection.

    def _receive(self) -> None:
        """Reads the connection; and while it brings bulk, goes on without a round of the loop for each piece."""
        for _ in range(RECEIVES_AT_ONCE):
            if not self._receive_once() or self.lost:
                return
            if not self.connection.is_extended and self.pending.size >= LEGACY_STDIN_CEILING:
                return

    def _receive_once(self) -> bool:
        """Whether more is likely to be there."""
        connection = self.connection
        buffer = self._buffers.current
        head_size = 0
        if self._inlet is not None:
            room = connection.bulk_room(messages.STDIN)
            taken = self._take_bulk(self._inlet, room) if room else 0
            if taken:
                return taken == room
            head_size = connection.bulk_head_size
            if head_size:
                buffer = buffer[:head_size]
        try:
            size = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if self._silence is not None and size:
            self._silence.heard(time.monotonic())
        if not size:
            self._handle(connection.receive_end())
            self.lost = self.lost or "the client is gone"
            return False
        self._handle(connection.receive_data(buffer[:size]))
        if self.pending.is_borrowing:
            self._buffers.secure(self.pending)
        self._buffers.received(size)
        return size >= BULK_PIECE or (head_size > 0 and connection.bulk_room(messages.STDIN) > 0)

    def _take_bulk(self, inlet: Conduit, room: int) -> int:
        """The next of a large frame, past this process's memory: how much. 0 when receiving tells what there is."""
        try:
            taken = inlet.fill(self.fd, room)
        except OSError:
            # Nothing there; or no room in the conduit, since the target does not read: then memory takes it, up to the
            # credit. Or the client is gone.
            return 0
        if taken:
            if self._silence is not None:
                self._silence.heard(time.monotonic())
            self.connection.took(messages.STDIN, taken)
            self.pending.append_elsewhere(inlet, taken)
            if self.pending.size == taken:
                self._write_stdin()
        return taken

    def _flush(self) -> None:
        output = self.connection.output
        if not output.size:
            return
        if self._silence is not None:
            self._silence.said(time.monotonic())
        try:
            while output.size:
                write_output(output, self.fd)
            self._sending.clear()
        except BlockingIOError:
            pass
        except OSError as error:
            # What the client sent before it went still counts for nothing: its session is over.
            self.lost = self.lost or f"the client is gone: {error.strerror}"

    def _handle(self, events: list[Event]) -> None:
        data = [event.data for event in events if isinstance(event, Data)]
        if data:
            self._take_stdin(data)
        for event in events:
            if not isinstance(event, Data):
                self._obey(event)

    def _obey(self, event: Event) -> None:
        if isinstance(event, EndOfStream):
            self._end_stdin()
        elif isinstance(event, Signalled):
            processes.signal_target(self.target.pid, event.number, self._terminal())
        elif isinstance(event, Resized) and self.target.has_pty:
            set_window_size(self._terminal(), event.rows, event.cols)
        elif isinstance(event, StreamClosed):
            self._close_source(event.stream)
        elif isinstance(event, Held) and self._silence is not None:
            self._silence.hold()
        elif isinstance(event, Failed):
            self.lost = event.description
        elif isinstance(event, Broken):
            self.lost = event.reason
            if not event.is_end:
                self.connection.send_failure(event.reason, Failure(messages.PROTOCOL))

    def _terminal(self) -> int:
        return self.target.stdout if self.target.has_pty else -1

    # stdin of the target.

    def _take_stdin(self, pieces: list[memoryview]) -> None:
        """Pieces of the receive buffer, for the target: what it does not take now waits."""
        if self.stdin < 0:
            return
        before = self.pending.size
        for piece in pieces:
            self.pending.append(piece)
        received = self.pending.size - before
        if not before:
            self._write_stdin()
        if received >= SPLICE_SIZE and self._can_enlarge_stdin and self.stdin >= 0:
            self._can_enlarge_stdin = False
            enlarge_pipe(self.stdin, PIPE_SIZE)
            if self.connection.is_extended:
                self._inlet = open_conduit()

    def _write_stdin(self) -> None:
        """What waits for the target, as far as it takes it."""
        pending = self.pending
        try:
            while pending.size:
                self.connection.consumed(messages.STDIN, write_output(pending, self.stdin))
        except BlockingIOError:
            return
        except OSError:
            self._close_stdin(is_ours=False)
            return
        if self.is_stdin_ending:
            self._close_stdin(is_ours=True)

    def _end_stdin(self) -> None:
        if self.stdin < 0 or self.is_stdin_ending:
            return
        if self.target.has_pty:
            self.pending.append(CTRL_D)
            self._write_stdin()
            return
        self.is_stdin_ending = True
        if not self.pending.size:
            self._close_stdin(is_ours=True)

    def _close_stdin(self, *, is_ours: bool) -> None:
        """Closes the target's stdin: it got all, or (not is_ours) it reads no more, which the client should know."""
        self.pending.clear()
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None
        if not self.target.has_pty:
            self._forget(self.stdin)
            os.close(self.stdin)
        self.stdin = -1
        if not is_ours:
            self.connection.close_stream(messages.STDIN)

    # Output of the target.

    def _read_source(self, stream: int) -> None:
        if not self._can_read(stream):
            return
        fd = self.sources[stream]
        sluice = self._sluices.get(stream) if stream in self._bulky else None
        if sluice is not None:
            self._pass_source(stream, fd, sluice)
            return
        chunk = self._chunks.get(stream)
        if chunk is None:
            chunk = self._chunks[stream] = memoryview(bytearray(CHUNK_SIZES[0]))
        room = self.connection.send_room(stream)
        try:
            size = _read_burst(fd, chunk if room >= len(chunk) else chunk[:room])
        except BlockingIOError:
            if self.exit is not None and self.target.has_pty:
                # The target is gone and its terminal is drained.
                self._close_source(stream)
            return
        except OSError:
            size = 0  # EIO: the terminal has no other end any more
        if not size:
            self._close_source(stream)
            return
        self.connection.send_data(stream, chunk[:size])
        self._sending.add(stream)
        if size == len(chunk) and not self._begin_bulk(stream, size):
            self._enlarge_chunk(stream, fd, size)

    def _begin_bulk(self, stream: int, size: int) -> bool:
        """After a chunk that was filled: whether a conduit is used from now on."""
        if size < CHUNK_SIZES[1] or self.target.has_pty or not self.connection.is_extended:
            return False
        if stream not in self._sluices:
            self._sluices[stream] = open_sluice()
            enlarge_pipe(self.sources[stream], PIPE_SIZE)
        if self._sluices[stream] is None:
            return False
        self._bulky.add(stream)
        return True

    def _pass_source(self, stream: int, fd: int, sluice: Sluice) -> None:
        """As much as one frame carries, past this process's memory."""
        limit = min(self.connection.send_room(stream), self.connection.max_data)
        try:
            size = sluice.fill(fd, limit)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._close_source(stream)
            return
        sluice.append_to(self.connection.output, self.connection.begin_data(stream, size))
        self._sending.add(stream)
        if size < CHUNK_SIZES[0]:
            # Bulk no more: what is small is read and written with fewer calls.
            self._bulky.discard(stream)

    def _enlarge_chunk(self, stream: int, fd: int, size: int) -> None:
        """A chunk that was filled is followed by a larger one, up to what one frame (or one writev()) carries."""
        limit = self.connection.max_data if self.connection.is_extended else LEGACY_READ_SIZE
        larger = min(limit, CHUNK_SIZES[1] if size < CHUNK_SIZES[1] else limit)
        if larger > size:
            self._chunks[stream] = memoryview(bytearray(larger))
        if size == CHUNK_SIZES[1] and not self.target.has_pty:
            enlarge_pipe(fd, PIPE_SIZE)

    def _read_drained_terminal(self) -> None:
        if self._is_terminal_draining():
            self._read_source(messages.STDOUT)

    def _is_terminal_draining(self) -> bool:
        """After the target's end nothing announces that its terminal is empty but an empty read: it is time for one."""
        return self.exit is not None and self.target.has_pty and self._can_read(messages.STDOUT)

    def _close_source(self, stream: int) -> None:
        fd = self.sources.pop(stream, -1)
        if fd < 0:
            return
        self._forget(fd)
        if not self.target.has_pty:
            os.close(fd)
        self.connection.send_end(stream)

    # The end.

    def _take_signals(self) -> None:
        if signals.SIGTERM in self.wakeup.take():
            self.lost = "vshd is shutting down"
            self.connection.send_failure(self.lost, Failure(messages.SHUTDOWN))
        self._look_for_exit()

    def _look_for_exit(self) -> None:
        if self.exit is None:
            self.exit = processes.find_exit(self.target.pid)

    def _is_complete(self) -> bool:
        return self.exit is not None and not self.sources and self.connection.state == state.RUNNING

    def _send_exit(self) -> None:
        assert self.exit is not None
        if self.connection.is_extended:
            self.connection.send_end(messages.STDERR)
        self.connection.send_exit(self.exit.code, signal=self.exit.signal, core_dumped=self.exit.core_dumped)
        self._flush()
        # A client that is slow or suspended takes the rest when it can.
        while self.connection.output.size and not self.lost:
            for fd, mask in self._wait():
                self._serve(fd, mask)
            self._flush()
        self.undelivered, self.lost = self.lost, ""


def _read_burst(fd: int, chunk: memoryview) -> int:
    """Reads what is there, and when that is bulk also what comes meanwhile.

    A producer writes in small pieces, and a round of the loop for each would be slower than the producer. Raises
    OSError of the first read only.
    """
    size = os.readv(fd, [chunk])
    if size >= BURST_SIZE:
        try:
            while size < len(chunk):
                more = os.readv(fd, [chunk[size:]])
                if not more:
                    break
                size += more
        except OSError:
            pass
    return size
