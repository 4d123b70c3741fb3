"""Runs one session on this process's stdio (pipes, files, sockets). Passes signals on, and announces suspension."""

from vsh import signals
from vsh.errors import VshError
from vsh.pump import Pump, Sink, Source
from vsh.session import Session
from vsh.stdio import FdSink, FdSource
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALLED = 128


class Interrupted(VshError):  # noqa: N818 - it names what happened
    """A signal ends this process itself: it came after the target's end, while output waited for a reader, or it was
    the last that the process has patience for.
    """


class Shell:
    """Invariant: from start to end, it passes signals on, and they do not end this process."""

    has_pty = False
    pump_class = Pump
    # After so many SIGINT and SIGTERM this process no longer waits for the target's end; 0: it always waits.
    patience = 0

    def __init__(self, session: Session) -> None:
        self.session = session
        self._asked = 0
        # Those that see the sizes of the terminal, in rows and columns.
        self.on_size: list[Callable[[int, int], None]] = []
        sinks: dict[int, Sink] = {messages.STDOUT: self.make_sink(), messages.STDERR: FdSink(2, is_shared=True)}
        self.pump = self.pump_class(session, self.make_source(), sinks, has_pty=self.has_pty)
        self.wakeup = signals.Wakeup((*signals.FORWARDED, signals.SIGWINCH, signals.SIGTSTP))
        self.pump.wakeup_fd = self.wakeup.fd
        self.pump.on_wakeup = self._take_signals

    def run(self, deadline_s: float | None) -> int:
        """Relays until the end; returns the exit status. deadline_s: of time.monotonic(). Raises VshError."""
        try:
            end = self.pump.run(deadline_s)
        finally:
            self.session.close()
            self.wakeup.ignore()
        return SIGNALLED + end.signal if end.signal else end.code

    def make_source(self) -> Source:
        return FdSource(0)

    def make_sink(self) -> Sink:
        return FdSink(1)

    def suspend(self) -> None:
        """Announces the stop to the server, then stops this process. Returns when it is continued."""
        self.session.connection.send_hold()
        self.session.flush()
        signals.stop_self()
        self.session.connection.send_alive()

    def send_size(self) -> None:
        """Sends the terminal's new size. Does nothing without a terminal."""

    def _take_signals(self) -> None:
        for number in self.wakeup.take():
            if number == signals.SIGWINCH:
                self.send_size()
            elif number == signals.SIGTSTP:
                self.suspend()
            elif number in signals.FORWARDED:
                if self.pump.exit is not None:
                    raise Interrupted("", status=SIGNALLED + number)
                if number in (signals.SIGINT, signals.SIGTERM):
                    self._asked += 1
                    if self._asked == self.patience:
                        brief = f"{self._asked} signals came, and the command did not end"
                        raise Interrupted(brief, status=SIGNALLED + number)
                self.session.send_signal(number)
