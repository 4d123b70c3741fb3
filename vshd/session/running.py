"""The target's side of a session: a program that runs, what is on its way to it, and what it prints.

Owns our ends of the target's stdio, and its exit. It can live without a client: nothing here knows of a descriptor to
one, of silence or of a client's end. Bytes go into and come out of a ServerConnection, which has no I/O of its own.
Every descriptor is non-blocking and every buffer has a ceiling: in extended mode the peer's credit, in legacy mode
LEGACY_STDIN_CEILING and the transport's own back-pressure.
"""

import os
import select

from vshd import processes
from vshd.processes import Exit
from vshd.session.intake import Intake
from vshd.session.outflow import Outflow
from vshd.session.target import Target, resize_window
from vshd.wire import messages
from vshd.wire.server import ServerConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Without credit, stdin for a target that does not read is kept up to here; then the connection is not read any more.
LEGACY_STDIN_CEILING = 1 << 20

_ERRORS = select.POLLHUP | select.POLLERR | select.POLLNVAL


class RunningTarget:
    """Invariant: `sources` are the streams of output that have not ended; `exit` is set once the target has ended."""

    def __init__(self, target: Target, connection: ServerConnection, on_close: "Callable[[int], None]") -> None:
        """on_close: is told each descriptor before it is closed."""
        self.exit: Exit | None = None
        self.target = target
        self._connection = connection
        self._on_close = on_close
        is_terminal = target.has_pty
        self.stdin = Intake(connection, target.stdin, is_terminal=is_terminal, on_close=on_close)
        self.sources = {messages.STDOUT: Outflow(connection, messages.STDOUT, target.stdout, is_terminal=is_terminal)}
        if target.stderr >= 0:
            self.sources[messages.STDERR] = Outflow(connection, messages.STDERR, target.stderr, is_terminal=False)
        self._outflows = tuple(self.sources.values())

    def close(self) -> None:
        """Closes our ends of its stdio; a terminal is hung up by it."""
        self.stdin.close(is_ours=True)
        for outflow in self._outflows:
            outflow.close()
        self.sources = {}
        if self.target.has_pty:
            os.close(self.target.stdout)
            os.close(self.target.slave)

    # Readiness.

    def wants(self) -> "Iterator[tuple[int, int, bool]]":
        """Each descriptor, what it is polled for, and whether its errors are wanted even for nothing else."""
        waiting = self.stdin.waiting.size
        if self.target.has_pty:
            readable = any(outflow.can_read for outflow in self.sources.values())
            mask = (select.POLLOUT if waiting else 0) | (select.POLLIN if readable else 0)
            yield self.target.stdout, mask, False
            return
        if self.stdin.fd >= 0:
            # Watched even with nothing to write: the pipe's error shows that the target closed it.
            yield self.stdin.fd, select.POLLOUT if waiting else 0, True
        for outflow in self.sources.values():
            yield outflow.fd, select.POLLIN if outflow.can_read else 0, False

    def serve(self, fd: int, mask: int) -> None:
        """One of its descriptors is ready."""
        if fd == self.target.stdout and self.target.has_pty:
            if mask & select.POLLOUT:
                self.stdin.write()
            if mask & (select.POLLIN | _ERRORS):
                self._read(messages.STDOUT)
        elif fd == self.stdin.fd:
            if mask & _ERRORS and not mask & select.POLLOUT:
                self.stdin.close(is_ours=False)
            else:
                self.stdin.write()
        else:
            for stream, outflow in list(self.sources.items()):
                if outflow.fd == fd:
                    self._read(stream)

    @property
    def is_stuffed(self) -> bool:
        """Whether so much of a legacy client's stdin waits that its connection is not to be read."""
        return not self._connection.is_extended and self.stdin.waiting.size >= LEGACY_STDIN_CEILING

    @property
    def count(self) -> tuple[int, int]:
        """How many bytes it has taken, and how many it has printed."""
        return self.stdin.passed, sum(outflow.passed for outflow in self._outflows)

    # What the client asks of it.

    def signal(self, number: int) -> None:
        """A signal for its process group, or for the foreground group of its terminal."""
        processes.signal_target(self.target.pid, number, self._terminal())

    def resize(self, rows: int, cols: int, xpixels: int = 0, ypixels: int = 0) -> None:
        """Its terminal's size; nothing without one."""
        if self.target.has_pty:
            resize_window(self._terminal(), rows, cols, xpixels, ypixels)

    def close_source(self, stream: int) -> None:
        """The client takes no more of this stream, or the stream has ended."""
        outflow = self.sources.pop(stream, None)
        if outflow is not None:
            self._on_close(outflow.fd)
            outflow.end()

    def _terminal(self) -> int:
        return self.target.stdout if self.target.has_pty else -1

    # Output.

    def sent_all(self) -> None:
        """What the streams put into the connection has left it: their chunks are free."""
        for outflow in self._outflows:
            outflow.is_sending = False

    def _read(self, stream: int) -> None:
        outflow = self.sources.get(stream)
        if outflow is None or not outflow.can_read:
            return
        try:
            if not outflow.read():
                self.close_source(stream)
        except BlockingIOError:
            if self.exit is not None and self.target.has_pty:
                # The target is gone and its terminal is drained.
                self.close_source(stream)

    def read_drained_terminal(self) -> None:
        """After the target's end nothing but an empty read announces that its terminal is empty."""
        if self.is_terminal_draining:
            self._read(messages.STDOUT)

    @property
    def is_terminal_draining(self) -> bool:
        """Whether it is time for such a read."""
        outflow = self.sources.get(messages.STDOUT) if self.exit is not None and self.target.has_pty else None
        return outflow is not None and outflow.can_read

    # The end.

    def look_for_exit(self) -> None:
        """After a SIGCHLD."""
        if self.exit is None:
            self.exit = processes.find_exit(self.target.pid)

    @property
    def seems_to_end(self) -> bool:
        """Whether an output has ended and the target, as far as is known, has not."""
        return self.exit is None and len(self.sources) < len(self._outflows)

    @property
    def has_ended(self) -> bool:
        """Whether it has exited and all its output is in the connection."""
        return self.exit is not None and not self.sources
