"""One running session: bytes between the client's connection and the target, both ways, none ever blocking another.

Owns the loop and the descriptors' readiness. The target's stdin is vshd.session.intake's, its output is
vshd.session.outflow's. Every descriptor is non-blocking and every buffer has a ceiling: in extended mode the peer's
credit, in legacy mode LEGACY_STDIN_CEILING and the transport's own back-pressure. Knows nothing of users, programs and
logs.
"""

import os
import select
import time

from vshd import processes, signals
from vshd.carry.conduit import write_output
from vshd.processes import Exit
from vshd.session.intake import Intake
from vshd.session.outflow import Outflow
from vshd.session.target import Target, resize_window
from vshd.wire import messages, state
from vshd.wire.buffers import Buffers
from vshd.wire.events import Broken, Data, EndOfStream, Event, Failed, Held, Resized, Signalled, StreamClosed
from vshd.wire.messages import Failure
from vshd.wire.server import ServerConnection
from vshd.wire.silence import Silence

# A receive of this much is bulk, and so many may follow one another; then signals and output have their turn.
BULK_PIECE = 1 << 14
RECEIVES_AT_ONCE = 8
# Without credit, stdin for a target that does not read is kept up to here; then the connection is not read any more.
LEGACY_STDIN_CEILING = 1 << 20

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Relay:
    """Invariant: `sources` are the streams of output that have not ended."""

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
        is_terminal = target.has_pty
        self.stdin = Intake(connection, target.stdin, is_terminal=is_terminal, on_close=self._forget)
        self.sources = {messages.STDOUT: Outflow(connection, messages.STDOUT, target.stdout, is_terminal=is_terminal)}
        if target.stderr >= 0:
            self.sources[messages.STDERR] = Outflow(connection, messages.STDERR, target.stderr, is_terminal=False)
        self._outflows = tuple(self.sources.values())
        self._buffers = Buffers()
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
        self.stdin.close(is_ours=True)
        for outflow in self._outflows:
            outflow.close()
        self.sources = {}
        if self.target.has_pty:
            os.close(self.target.stdout)
            os.close(self.target.slave)

    # Readiness.

    def _wait(self) -> list[tuple[int, int]]:
        self._want_all()
        timeout_s = self._check_silence()
        if self._is_terminal_draining():
            timeout_s = 0
        return self._poll.poll(None if timeout_s is None else timeout_s * 1000 + 1)

    def _want_all(self) -> None:
        connection = self.connection
        waiting = self.stdin.waiting.size
        is_reading = connection.is_extended or waiting < LEGACY_STDIN_CEILING
        self._want(
            self.fd, (select.POLLIN if is_reading else 0) | (select.POLLOUT if connection.output.size else 0), True
        )
        if self.target.has_pty:
            readable = any(outflow.can_read for outflow in self.sources.values())
            mask = (select.POLLOUT if waiting else 0) | (select.POLLIN if readable else 0)
            self._want(self.target.stdout, mask, False)
            return
        if self.stdin.fd >= 0:
            # Watched even with nothing to write: the pipe's error says that the target closed it.
            self._want(self.stdin.fd, select.POLLOUT if waiting else 0, True)
        for outflow in self.sources.values():
            self._want(outflow.fd, select.POLLIN if outflow.can_read else 0, False)

    def _want(self, fd: int, mask: int, keeps_errors: bool) -> None:
        """Polls `fd` for `mask`; for an empty one only if its errors are wanted, since poll() always reports those."""
        if not mask and not keeps_errors:
            self._forget(fd)
        elif self._masks.get(fd) != mask:
            self._poll.register(fd, mask)
            self._masks[fd] = mask

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
                self.stdin.write()
            if mask & (select.POLLIN | _ERRORS):
                self._read_source(messages.STDOUT)
        elif fd == self.stdin.fd:
            if mask & _ERRORS and not mask & select.POLLOUT:
                self.stdin.close(is_ours=False)
            else:
                self.stdin.write()
        else:
            for stream, outflow in list(self.sources.items()):
                if outflow.fd == fd:
                    self._read_source(stream)

    # The connection.

    def _receive(self) -> None:
        """Reads the connection; and while it brings bulk, goes on without a round of the loop for each piece."""
        for _ in range(RECEIVES_AT_ONCE):
            if not self._receive_once() or self.lost:
                return
            if not self.connection.is_extended and self.stdin.waiting.size >= LEGACY_STDIN_CEILING:
                return

    def _receive_once(self) -> bool:
        """Whether more is likely to be there."""
        stdin = self.stdin
        room = stdin.bulk_room
        if room:
            taken = stdin.pass_bulk(self.fd, room)
            if taken:
                self._hear()
                return taken == room
        buffer = self._buffers.current
        head_size = stdin.bulk_head_size
        if head_size:
            buffer = buffer[:head_size]
        try:
            size = os.readv(self.fd, [buffer])
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self._handle(self.connection.receive_end())
            self.lost = self.lost or "the client is gone"
            return False
        self._hear()
        self._handle(self.connection.receive_data(buffer[:size]))
        if stdin.waiting.is_borrowing:
            self._buffers.secure(stdin.waiting)
        self._buffers.received(size)
        return size >= BULK_PIECE or (head_size > 0 and stdin.bulk_room > 0)

    def _hear(self) -> None:
        if self._silence is not None:
            self._silence.heard(time.monotonic())

    def _flush(self) -> None:
        output = self.connection.output
        if not output.size:
            return
        if self._silence is not None:
            self._silence.said(time.monotonic())
        try:
            while output.size:
                write_output(output, self.fd)
            for outflow in self._outflows:
                outflow.is_sending = False
        except BlockingIOError:
            pass
        except OSError as error:
            # What the client sent before it went still counts for nothing: its session is over.
            self.lost = self.lost or f"the client is gone: {error.strerror}"

    def _handle(self, events: list[Event]) -> None:
        data: list[memoryview] = []
        for event in events:
            if isinstance(event, Data):
                data.append(event.data)
                continue
            # In the client's order: input that follows a window's size or a signal is for who has seen those.
            if data:
                self.stdin.take(data)
                data = []
            self._obey(event)
        if data:
            self.stdin.take(data)

    def _obey(self, event: Event) -> None:
        if isinstance(event, EndOfStream):
            self.stdin.end()
        elif isinstance(event, Signalled):
            processes.signal_target(self.target.pid, event.number, self._terminal())
        elif isinstance(event, Resized) and self.target.has_pty:
            resize_window(self._terminal(), event.rows, event.cols)
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

    # Output of the target.

    def _read_source(self, stream: int) -> None:
        outflow = self.sources.get(stream)
        if outflow is None or not outflow.can_read:
            return
        try:
            if not outflow.read():
                self._close_source(stream)
        except BlockingIOError:
            if self.exit is not None and self.target.has_pty:
                # The target is gone and its terminal is drained.
                self._close_source(stream)

    def _read_drained_terminal(self) -> None:
        if self._is_terminal_draining():
            self._read_source(messages.STDOUT)

    def _is_terminal_draining(self) -> bool:
        """After the target's end nothing announces that its terminal is empty but an empty read: it is time for one."""
        outflow = self.sources.get(messages.STDOUT) if self.exit is not None and self.target.has_pty else None
        return outflow is not None and outflow.can_read

    def _close_source(self, stream: int) -> None:
        outflow = self.sources.pop(stream, None)
        if outflow is not None:
            self._forget(outflow.fd)
            outflow.end()

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
