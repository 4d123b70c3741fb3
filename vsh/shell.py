"""One session on this process's stdio: pipes, files, sockets; signals passed on, suspension announced."""

from vsh import signals
from vsh.errors import VshError
from vsh.pump import Pump, Sink, Source
from vsh.session import Session
from vsh.stdio import FdSink, FdSource
from vshd.wire import messages

SIGNALLED = 128


class Interrupted(VshError):  # noqa: N818 - it names what happened
    """A signal came after the target's end, while its output waited for a reader: it is for vsh itself then."""


class Shell:
    """Invariant: from the first moment to the last, signals are passed on and do not end this process."""

    has_pty = False

    def __init__(self, session: Session) -> None:
        self.session = session
        sinks: dict[int, Sink] = {messages.STDOUT: FdSink(1), messages.STDERR: FdSink(2, is_shared=True)}
        self.pump = Pump(session, self.make_source(), sinks, has_pty=self.has_pty)
        self.wakeup = signals.Wakeup((*signals.FORWARDED, signals.SIGWINCH, signals.SIGTSTP))
        self.pump.wakeup_fd = self.wakeup.fd
        self.pump.on_wakeup = self._take_signals

    def run(self, deadline_s: float | None) -> int:
        """Relays until the end; the exit status. deadline_s: of time.monotonic(). Raises VshError."""
        try:
            end = self.pump.run(deadline_s)
        finally:
            self.session.close()
            self.wakeup.ignore()
        return SIGNALLED + end.signal if end.signal else end.code

    def make_source(self) -> Source:
        return FdSource(0)

    def suspend(self) -> None:
        """Stops this process, with the server forewarned; returns when it is continued."""
        self.session.connection.send_hold()
        self.session.flush()
        signals.stop_self()
        self.session.connection.send_alive()

    def send_size(self) -> None:
        """The terminal has another size; without one there is nothing to say."""

    def _take_signals(self) -> None:
        for number in self.wakeup.take():
            if number == signals.SIGWINCH:
                self.send_size()
            elif number == signals.SIGTSTP:
                self.suspend()
            elif number in signals.FORWARDED:
                if self.pump.exit is not None:
                    raise Interrupted("", status=SIGNALLED + number)
                self.session.send_signal(number)
