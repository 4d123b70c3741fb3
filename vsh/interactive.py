"""A session with a terminal: raw mode and the way back, window size, escapes."""

import os
from contextlib import suppress

from vsh import escapes, signals
from vsh.errors import ConnectionLost, VshError
from vsh.modes import TerminalModes
from vsh.pump import Sink, Source
from vsh.session import Session
from vsh.shell import SIGNALLED, Shell
from vsh.stdio import FdSink, FdSource, is_background
from vsh.terminal import RawTerminal, find_window


class TerminalGone(VshError):  # noqa: N818 - it names what happened
    """The terminal is gone: the session is hung up, as on every lost terminal."""


class InteractiveShell(Shell):
    """Invariant: `terminal` (None when vsh has none) is raw while the session runs and is the foreground job."""

    has_pty = True

    def __init__(self, session: Session) -> None:
        self.terminal = RawTerminal(0) if os.isatty(0) else None
        self._screen: Screen | None = None
        super().__init__(session)

    def run(self, deadline_s: float | None) -> int:
        """As Shell.run(); the terminal is restored in every case."""
        self.enter()
        try:
            return super().run(deadline_s)
        except BaseException:
            self._reset_screen()
            raise
        finally:
            self._leave()

    def make_source(self) -> Source:
        return FdSource(0) if self.terminal is None else TypedSource(FdSource(0), self)

    def make_sink(self) -> Sink:
        if not os.isatty(1):
            return super().make_sink()
        self._screen = Screen()
        return self._screen

    def suspend(self) -> None:
        self._leave()
        super().suspend()
        self.enter()
        self.send_size()

    def send_size(self) -> None:
        rows, cols, width, height = find_window()
        if rows:
            self.session.connection.send_resize(rows, cols, width, height)
            for see in self.on_size:
                see(rows, cols)

    def obey(self, command: str) -> None:
        """Carries out the command of an escape."""
        if command == escapes.DISCONNECT:
            raise ConnectionLost(f"disconnected from {self.session.name}")
        if command == escapes.SUSPEND:
            self.suspend()
        else:
            from vsh.patience import write_patiently  # noqa: PLC0415 - people rarely ask

            write_patiently(2, escapes.HELP.replace("\n", "\r\n").encode())

    def enter(self) -> bool:
        """Makes the terminal raw; False while it belongs to another job."""
        return self.terminal is None or self.terminal.enter()

    def _reset_screen(self) -> None:
        """Gives back what a full-screen program took and could not give back. Never waits for a stalled terminal."""
        reset = self._screen.modes.render_reset() if self._screen is not None else b""
        if reset and not is_background(1):
            assert self._screen is not None
            with suppress(OSError):
                self._screen.write([reset])

    def _leave(self) -> None:
        if self.terminal is not None:
            self.terminal.leave()


class Screen(FdSink):
    """stdout of a terminal: `modes` knows what the guest's program has turned on there."""

    def __init__(self) -> None:
        super().__init__(1)
        self.modes = TerminalModes()

    def write(self, pieces: list[memoryview | bytes]) -> int:
        size = left = super().write(pieces)
        for piece in pieces:
            if left <= 0:
                break
            self.modes.feed(bytes(piece[:left]))
            left -= len(piece)
        return size


class TypedSource(Source):
    """stdin of a terminal, with the escapes taken out of it.

    A raw terminal has no end of file (Ctrl-D is a byte). So its end is the end of the terminal, and of the session.
    """

    # An escape character that was held back and turns out to be none comes with the byte behind it.
    room_min = 2

    def __init__(self, source: Source, shell: InteractiveShell) -> None:
        self._source = source
        self._shell = shell
        self._filter = escapes.EscapeFilter()
        self.fd = source.fd

    @property
    def is_held(self) -> bool:
        """Whether the terminal belongs to another job. Makes it raw when it is ours again."""
        return not self._shell.enter()

    @property
    def look_s(self) -> float | None:
        terminal = self._shell.terminal
        return None if terminal is None else terminal.look_s

    def read(self, limit: int) -> bytes | None:
        data = self._source.read(limit - 1)
        if data is None:
            return None
        if not data:
            raise TerminalGone("the terminal is gone", status=SIGNALLED + signals.SIGHUP)
        typed, commands = self._filter.feed(bytes(data))
        for command in commands:
            self._shell.obey(command)
        return typed or None
