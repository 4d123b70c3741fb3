"""A lasting session on this process's stdio. The session goes on when this process ends, however that comes."""

import os

from vsh import escapes, signals
from vsh.errors import VshError
from vsh.interactive import InteractiveShell
from vsh.memory import BytesSource
from vsh.patience import write_patiently
from vsh.pump import Pump, Source
from vsh.session import Session
from vsh.shell import SIGNALLED, Interrupted, Shell
from vshd.wire.events import Event, Positioned

# What the target gets of an attached client's signals. HUP and TERM are for the client: its terminal is gone.
PASSED_ON = (signals.SIGINT, signals.SIGQUIT, signals.SIGUSR1, signals.SIGUSR2)

HELP = escapes.HELP.replace(
    "disconnect; what runs in the terminal is hung up", "leave the session, which goes on without you"
)


class Detached(VshError):  # noqa: N818 - it names what happened
    """The person has left the session."""

    status = 0


class DroppingPump(Pump):
    """A pump that tells of output which the session has not kept."""

    def _handle(self, event: Event) -> None:
        if isinstance(event, Positioned) and event.dropped:
            self.tell(event)
        super()._handle(event)

    def tell(self, position: Positioned) -> None:
        """One line; a terminal may be raw."""
        text = f"vsh: {position.dropped} bytes of output before offset {position.offset} were not kept"
        end = "\r\n" if os.isatty(2) else "\n"
        try:
            write_patiently(2, (text + end).encode())
        except OSError:
            pass


class Watching(Shell):
    """Reads the output, or waits for the end: types nothing, passes no signal on."""

    pump_class = DroppingPump

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.pump.parting = "the session goes on"

    def make_source(self) -> Source:
        return BytesSource(b"")

    def _take_signals(self) -> None:
        take_signals(self, ())


class Typing(Watching):
    """Gives this process's stdin to the session."""

    def make_source(self) -> Source:
        return Shell.make_source(self)


class Attached(Typing):
    """Both ways, with pipes."""

    def _take_signals(self) -> None:
        take_signals(self, PASSED_ON)


class AttachedTerminal(InteractiveShell):
    """Both ways, with a terminal."""

    pump_class = DroppingPump

    def __init__(self, session: Session, name: str) -> None:
        self._name = name
        super().__init__(session)
        self.pump.parting = "the session goes on"

    def obey(self, command: str) -> None:
        if command == escapes.DISCONNECT:
            raise Detached(f"left session {self._name}, which goes on", hint=f"come back: vsh --attach {self._name}")
        if command == escapes.SHOW_HELP:
            write_patiently(2, HELP.replace("\n", "\r\n").encode())
        else:
            super().obey(command)

    def _take_signals(self) -> None:
        take_signals(self, PASSED_ON)


def take_signals(shell: Shell, passed_on: tuple[int, ...]) -> None:
    """Obeys what came. Raises Interrupted for a signal that ends this process, and not the session."""
    for number in shell.wakeup.take():
        if number == signals.SIGWINCH:
            shell.send_size()
        elif number == signals.SIGTSTP:
            shell.suspend()
        elif number in passed_on and shell.pump.exit is None:
            shell.session.send_signal(number)
        elif number in signals.FORWARDED:
            raise Interrupted("", status=SIGNALLED + number)
