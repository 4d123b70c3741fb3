"""pid 1's part in the guest's log: the sockets, which are there before any program runs, and the process behind them.

The process is forked when the first line waits, or the host asks. So it costs the start of a guest nothing, and a guest
that logs nothing has none. While there is no process, pid 1 holds the sockets, and throws away what comes where it has
to wait: no program of the guest may hang because no process reads its lines.
"""

import _socket
import os
import select

from vshd.carry.inherited import settle_signals
from vshd.carry.records import JOURNAL, SYSLOG
from vshd.signals import SIGKILL, SIGTERM, Wakeup
from vshd.syslog.sockets import open_handed, open_log_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from vshd.syslog.journal import JournalSource
    from vshd.syslog.sources import KernelSource, SocketSource

# Over it vshd hands on the host's connection. The directory is memory.
HANDED = "/run/vshd.logs"
DISCARD_AT_ONCE = 256
# After a process that died. One that dies at once must not keep the guest busy.
PAUSE_S = 1.0


class CollectorKeeper:
    """Invariant: `pid` is the running process's, or -1. The sockets are open all the time; None: there is none."""

    def __init__(self, report: "Callable[[str], None]") -> None:
        """report: takes a line about what goes wrong."""
        self.pid = -1
        self._report = report
        self._due_s = 0.0
        self._path = ""
        self._log: _socket.socket | None = None
        self._kind = SYSLOG
        self._handed: _socket.socket | None = None

    @property
    def is_open(self) -> bool:
        """Whether a process can collect."""
        return self._handed is not None

    def open(self, path: str, handed: str) -> None:
        """Listens at `path` for the lines of programs, and at `handed` for vshd. Goes on without, where it cannot."""
        try:
            self._log = open_log_socket(path)
            self._path = path
            self._handed = open_handed(handed)
        except OSError as error:
            self._report(f"cannot collect the guest's log: {error.strerror}")
            if self._log is not None:
                self._log.close()
                self._log = None

    def yield_path(self) -> None:
        """Gives the path up for the root's systemd, whose journal has a socket there. Raises OSError."""
        if self._log is not None:
            os.unlink(self._path)
            self._log.close()
            self._log = None

    def take_journal(self, journal: _socket.socket) -> None:
        """Listens at this socket from here on, to which the journal sends lines or, over a stream, records."""
        self._log, self._kind = journal, JOURNAL

    def watch(self, poll: "select.poll") -> list[int]:
        """Has poll() announce work for a process, as long as there is none. Returns the descriptors."""
        fds = [socket.fileno() for socket in (self._log, self._handed) if socket is not None]
        for fd in fds:
            poll.register(fd, select.POLLIN if self.pid < 0 else 0)
        return fds

    def tend(self, now_s: float, leave: "Callable[[], None]") -> None:
        """Something waits: starts the process, or throws it away where the last process has just died.

        now_s: time.monotonic(). leave: closes in the process what is pid 1's own.
        """
        if now_s < self._due_s:
            self._discard()
            return
        try:
            self.start(leave)
        except OSError as error:
            self._report(f"cannot start the collector of the log: {error.strerror}")
            self._due_s = now_s + PAUSE_S

    def start(self, leave: "Callable[[], None]") -> None:
        """Forks the process, if there is none. Raises OSError."""
        if self._handed is None or self.pid >= 0:
            return
        pid = os.fork()
        if pid == 0:
            self._collect(leave)
        self.pid = pid

    def stop(self) -> None:
        """Ends the process at once. What it has collected is lost."""
        if self.pid >= 0:
            os.kill(self.pid, SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = -1

    def note_end(self, status: int, now_s: float) -> None:
        """The process has ended."""
        self.pid = -1
        if status:
            self._report(f"the collector of the log ended with {status}")
            self._due_s = now_s + PAUSE_S

    def _discard(self) -> None:
        for socket in (self._log, self._handed):
            if socket is None:
                continue
            try:
                for _ in range(DISCARD_AT_ONCE):
                    if socket.type == _socket.SOCK_STREAM:
                        # The journal connects again with its next record.
                        os.close(socket._accept()[0])  # type: ignore[attr-defined]  # typeshed lacks it
                    else:
                        # Descriptors that come along are closed by the kernel.
                        socket.recv(1)
            except OSError:
                pass

    def _collect(self, leave: "Callable[[], None]") -> "NoReturn":
        status = 1
        try:
            leave()
            os.setsid()
            wakeup = Wakeup((SIGTERM,))
            settle_signals()
            # Not before there is something to collect.
            from vshd.syslog.collecting import Collector, open_kernel_log  # noqa: PLC0415

            sources = self._open_sources()
            kernel = open_kernel_log()
            if kernel is not None:
                sources.append(kernel)
            assert self._handed is not None
            Collector(sources, self._handed).run(wakeup)
            status = 0
        except BaseException as error:  # reported here, or nowhere
            self._report(f"the collector of the log: {type(error).__name__}: {error}")
        finally:
            os._exit(status)

    def _open_sources(self) -> "list[SocketSource | KernelSource | JournalSource]":
        if self._log is None:
            return []
        if self._log.type == _socket.SOCK_STREAM:
            from vshd.syslog.journal import JournalSource  # noqa: PLC0415 - see _collect

            return [JournalSource(self._log)]
        from vshd.syslog.sources import SocketSource  # noqa: PLC0415 - see _collect

        return [SocketSource(self._log, self._kind)]
