"""One client of a lasting session: what it has got of the output, what it may type, and when it is done.

Knows the session as a LastingSession, which is the keeper's; reads no other client's state.
"""

from vshd.lasting.ring import Ring
from vshd.processes import Exit
from vshd.session.client import ClientSide
from vshd.session.intake import Intake
from vshd.session.running import RunningTarget
from vshd.wire import messages
from vshd.wire.connection import WINDOW
from vshd.wire.events import EndOfStream, Event, Resized, Signalled
from vshd.wire.requests import Attach
from vshd.wire.server import ServerConnection

# What is copied out of the ring at once, for each client.
PIECE_SIZE = 1 << 16
# Stdin that waits, of all writers that followed each other; above it the writer is not read.
TYPED_MAX = 2 * WINDOW

WRITING = (messages.BOTH, messages.INPUT)
READING = (messages.BOTH, messages.OUTPUT, messages.FOLLOW)


class LastingSession:
    """What the clients of one session share. Invariant: `writer` is one of the clients, or None; `owed` bytes of the
    stdin that waits were not sent by it.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.writer: Watcher | None = None
        self.owed = 0
        # Set by the keeper at once, and when the target has ended and all its output is in the ring.
        self.running: RunningTarget
        self.exit: Exit | None = None

    def change_writer(self, writer: "Watcher | None") -> None:
        """What waits belongs to no client any more."""
        self.writer = writer
        self.owed = self.running.stdin.waiting.size

    def consumed(self, size: int) -> None:
        """The target took so much of its stdin."""
        foreign = min(self.owed, size)
        self.owed -= foreign
        if self.writer is not None:
            self.writer.side.connection.consumed(messages.STDIN, size - foreign)

    def close_stdin(self) -> None:
        """The target reads no more."""
        if self.writer is not None:
            self.writer.side.connection.close_stream(messages.STDIN)


class RingConnection(ServerConnection):
    """In place of a client: takes the target's output for the ring, and tells the writer of its stdin."""

    def __init__(self, kept: LastingSession) -> None:
        super().__init__(None)
        self._kept = kept

    def send_room(self, stream: int) -> int:
        return PIECE_SIZE

    def send_data(self, stream: int, data: "memoryview | bytes") -> None:
        self._kept.ring.append(stream, memoryview(data))

    def send_end(self, stream: int) -> None:
        """The ring has no ends of streams: they end with the session."""

    def consumed(self, stream: int, size: int) -> None:
        self._kept.consumed(size)

    def close_stream(self, stream: int) -> None:
        self._kept.close_stdin()


class TypedInput(Intake):
    """What one client sends as stdin: it goes to the target's own intake, as a copy, from the writer alone."""

    def __init__(self, watcher: "Watcher", connection: ServerConnection) -> None:
        super().__init__(connection, -1, is_terminal=False, on_close=lambda _fd: None)
        self._watcher = watcher

    def take(self, pieces: list[memoryview]) -> None:
        kept = self._watcher.kept
        if kept.writer is self._watcher:
            kept.running.stdin.take([memoryview(b"".join(pieces))])


class Watcher:
    """Invariant: all output before `_cursor` was sent, or counted as dropped. `is_done`: nothing more is to be said."""

    def __init__(self, fd: int, connection: ServerConnection, attach: Attach, kept: LastingSession) -> None:
        self.kept = kept
        self.attach = attach
        self.is_done = False
        self._has_typed_all = False
        ring = kept.ring
        if attach.mode not in READING:
            self._cursor = ring.end
        elif attach.tail:
            self._cursor = max(ring.start, ring.end - attach.tail)
        else:
            self._cursor = min(attach.since, ring.end)
        self._stop = ring.end
        self.side = ClientSide(fd, connection, TypedInput(self, connection), self._obey, lambda: None)

    @property
    def is_over(self) -> bool:
        """Whether the connection is to be closed."""
        return bool(self.side.lost) or (self.is_done and not self.side.connection.output.size)

    def say_position(self) -> None:
        """Tells the client where the output goes on: before all else, and when the ring has overtaken it."""
        dropped = max(0, self.kept.ring.start - self._cursor)
        self._cursor += dropped
        self.side.connection.send_position(self._cursor, dropped, has_pty=self.kept.running.target.has_pty)

    def find_mask(self) -> int:
        """What its descriptor is polled for."""
        waits = self.kept.running.stdin.waiting.size
        return self.side.find_mask(is_reading=self.kept.writer is not self or waits <= TYPED_MAX)

    def feed(self) -> None:
        """Sends what the client can take now."""
        self.side.flush()
        while not self.side.connection.output.size and not self.side.lost and not self.is_done and self._say_next():
            self.side.flush()

    def _say_next(self) -> bool:
        """Puts what comes next into the connection; False while there is nothing, or no room for it."""
        connection = self.side.connection
        if self.attach.mode in READING and self._cursor < self.kept.ring.start:
            self.say_position()
            return True
        if self.attach.mode in READING and self._cursor < self._find_stop():
            return self._say_output()
        exit = self._find_exit()
        if exit is None:
            return False
        self.is_done = True
        for stream in (messages.STDOUT, messages.STDERR):
            connection.send_end(stream)
        connection.send_exit(exit.code, signal=exit.signal, core_dumped=exit.core_dumped)
        return True

    def _find_stop(self) -> int:
        return min(self._stop, self.kept.ring.end) if self.attach.mode == messages.OUTPUT else self.kept.ring.end

    def _say_output(self) -> bool:
        connection = self.side.connection
        stream, data = self.kept.ring.read(self._cursor, min(PIECE_SIZE, self._find_stop() - self._cursor))
        if connection.sending[stream].is_closed:
            self._cursor += len(data)
            return True
        data = data[: connection.send_room(stream)]
        if not data:
            return False
        connection.send_data(stream, data)
        self._cursor += len(data)
        return True

    def _find_exit(self) -> Exit | None:
        """How the connection's session ends now: as the target did, or well when this client got what it wanted."""
        mode, stdin = self.attach.mode, self.kept.running.stdin
        if mode == messages.OUTPUT or (mode == messages.INPUT and self._has_typed_all and not stdin.waiting.size):
            return Exit(0)
        return self.kept.exit

    def _obey(self, event: Event) -> None:
        running, is_writer = self.kept.running, self.kept.writer is self
        if isinstance(event, EndOfStream):
            self._has_typed_all = True
            if is_writer and self.attach.closes:
                running.stdin.end()
        elif self.attach.mode != messages.BOTH or not is_writer or self.kept.exit is not None:
            # The others only look.
            return
        elif isinstance(event, Signalled):
            running.signal(event.number)
        elif isinstance(event, Resized):
            running.resize(event.rows, event.cols, event.xpixels, event.ypixels)
