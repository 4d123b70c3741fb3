"""A person at a machine's serial console: the loop between a terminal and the console's socket."""

import contextlib
import os
import select
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from vmkit.errors import MachineError

if TYPE_CHECKING:
    from vsh.terminal import RawTerminal

READ_BYTES = 65536
# Ctrl-], as virsh and telnet have it: a byte that no guest needs from a console.
DETACH_BYTE = b"\x1d"
# What is typed into a guest that takes nothing: more is not read from a pipe, and dropped from a keyboard, so that
# Ctrl-] always works.
MAX_TYPED_BYTES = 64 * 1024


class Attachment:
    """A terminal at a console. Invariant: `_typed` is what the console has not taken yet."""

    def __init__(
        self, sock: socket.socket, stdin: int, show: Callable[[bytes], None], terminal: "RawTerminal | None" = None
    ) -> None:
        """show: prints what the guest prints. terminal: of `stdin`; raw while this process is in its foreground."""
        self._sock = sock
        self._print = show
        self._stdin: int | None = stdin
        self._terminal = terminal
        self._is_keyboard = os.isatty(stdin)
        self._typed = b""

    def run(self) -> None:
        """Until Ctrl-], or the console's end. The end of stdin ends typing only."""
        while True:
            console = self._sock.fileno()
            sources = [] if self._is_held() else self._list_sources()
            look_s = None if self._terminal is None else self._terminal.look_s
            readable, writable, _ = select.select([console, *sources], [console] if self._typed else [], [], look_s)
            try:
                if console in readable and not self._show():
                    return
                if writable:
                    self._typed = self._typed[self._sock.send(self._typed) :]
            except (BrokenPipeError, ConnectionResetError) as error:
                raise MachineError(
                    "the monitor closed the console: this program read nothing for too long, or the guest took no input"
                ) from error
            if self._stdin in readable and not self._is_held() and not self._type():
                # What was typed before Ctrl-] still goes, if it can.
                with contextlib.suppress(OSError):
                    self._sock.send(self._typed)
                return

    def _is_held(self) -> bool:
        """The terminal belongs to another job; when it is ours again, it becomes raw here."""
        return self._terminal is not None and self._stdin is not None and not self._terminal.enter()

    def _list_sources(self) -> list[int]:
        is_full = len(self._typed) >= MAX_TYPED_BYTES and not self._is_keyboard
        return [] if self._stdin is None or is_full else [self._stdin]

    def _show(self) -> bool:
        data = self._sock.recv(READ_BYTES)
        self._print(data)
        return bool(data)

    def _type(self) -> bool:
        """False when the person wants to leave."""
        assert self._stdin is not None
        data = os.read(self._stdin, READ_BYTES)
        if not data:
            self._stdin = None
        before, leave, _ = data.partition(DETACH_BYTE) if self._is_keyboard else (data, b"", b"")
        room = MAX_TYPED_BYTES - len(self._typed) if self._is_keyboard else len(before)
        self._typed += before[:room]
        return not leave
