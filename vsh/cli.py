"""vsh as a person uses it: options become a request and an address, and a session is joined to this process's stdio.

Owns the terminal's part in it: raw mode, window size, escapes, signals, suspension.
"""

import os
import sys

from vsh import address, escapes, signals
from vsh.address import Address
from vsh.errors import ConnectionLost, VshError
from vsh.flags import Options, split_command
from vsh.pump import Pump, Sink, Source, deadline_after
from vsh.session import Session, make_limits, open_session
from vsh.stdio import FdSink, FdSource, hold_stdio
from vsh.terminal import RawTerminal, find_size, is_terminal
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# What a guest's programs need to draw on this terminal, beside TERM.
TERMINAL_VARIABLES = (b"LANG", b"LC_ALL", b"LC_CTYPE", b"COLORTERM")
# Without a terminal to ask, the size of every terminal's ancestor.
FALLBACK_SIZE = (24, 80)
SIGNALLED = 128


def run(options: Options) -> int:
    """Runs what the options say and returns vsh's exit status. Raises VshError."""
    hold_stdio()
    where = find_address(options)
    if options.target_container or options.listen_port is not None:
        where = find_container(where, options)
    has_pty = wants_pty(options)
    request = make_request(options, has_pty=has_pty)
    limits = make_limits(int(options.keepalive * 1000)) if options.extended else None
    deadline_s = deadline_after(options.timeout or None)
    connect_s = min(filter(None, (options.timeout, options.connect_timeout)), default=0.0)
    session = open_session(where, request, limits=limits, timeout_s=connect_s, see=_make_trace(options))
    if options.verbose or options.debug:
        mode = "extended" if session.connection.is_extended else "legacy"
        print(f"vsh: {where.name}: pid {session.pid}, {mode} mode", file=sys.stderr)
    return Shell(session, options, has_pty=has_pty).run(deadline_s)


def _make_trace(options: Options) -> "Callable[[str, memoryview], None] | None":
    if not options.debug:
        return None
    from vsh.trace import Trace  # noqa: PLC0415

    return Trace().see


def find_address(options: Options) -> Address:
    """The one address the options name, or that of the only running machine. Raises VshError."""
    named = [name for name in ("cid", "vm_name", "uds", "unix", "fd") if getattr(options, name) not in (None, "")]
    if len(named) > 1:
        raise VshError("Exactly one of --cid or --vm_name is required", details=f"given: --{', --'.join(named)}")
    if options.cid is not None:
        return address.find_by_cid(options.cid, options.port)
    if options.vm_name:
        return address.find_by_name(options.vm_name, options.port)
    if options.uds:
        return Address.hybrid(options.uds, options.port)
    if options.unix:
        return Address.unix(options.unix)
    if options.fd is not None:
        return Address.descriptor(options.fd)
    return address.find_only(options.port)


def find_container(vm: Address, options: Options) -> Address:
    """The connection of a vshd in a container of `vm`. Raises VshError."""
    from vsh.container import DEFAULT_CONTAINER, open_container  # noqa: PLC0415 - few need it, and it needs threads

    name = options.target_container or DEFAULT_CONTAINER
    return open_container(vm, name, options.launch, options.listen_port)


def wants_pty(options: Options) -> bool:
    """Upstream's rule, a terminal on both ends, unless -t or -T says otherwise."""
    if options.tty or options.notty:
        return options.tty
    return is_terminal(0) and is_terminal(1)


def make_request(options: Options, *, has_pty: bool) -> SetupConnectionRequest:
    """The setup request of the options."""
    environment: dict[bytes, bytes] = {}
    for name in (b"TERM", *(TERMINAL_VARIABLES if has_pty else ())):
        if name in os.environb:
            environment[name] = os.environb[name]
    for word in options.env:
        key, _, value = word.partition("=")
        environment[os.fsencode(key)] = os.fsencode(value)
    assignments, argv = split_command(options.command)
    environment.update(assignments)
    is_pid = options.cwd.isascii() and options.cwd.isdigit() and int(options.cwd) <= 0x7FFFFFFF
    rows, cols = find_size()
    if has_pty and not rows:
        rows, cols = FALLBACK_SIZE
    return SetupConnectionRequest(
        target=os.fsencode(options.target_container) or messages.VM_SHELL,
        user=os.fsencode(options.user),
        env=environment,
        argv=argv,
        window_rows=rows if has_pty else 0,
        window_cols=cols if has_pty else 0,
        nopty=not has_pty,
        cwd=b"" if is_pid else os.fsencode(options.cwd),
        cwd_pid=int(options.cwd) if is_pid else 0,
    )


class Disconnected(VshError):  # noqa: N818 - it names what happened
    """The user typed ~."""


class Shell:
    """One session on this process's stdio."""

    def __init__(self, session: Session, options: Options, *, has_pty: bool) -> None:
        self.session = session
        self.options = options
        self.has_pty = has_pty
        self.terminal = RawTerminal(0) if has_pty and is_terminal(0) else None
        source: Source = FdSource(0)
        if self.terminal is not None:
            source = TypedSource(source, self)
        sinks: dict[int, Sink] = {messages.STDOUT: FdSink(1), messages.STDERR: FdSink(2, is_shared=True)}
        self.pump = Pump(session, source, sinks, has_pty=has_pty)
        self.wakeup = signals.Wakeup((*signals.FORWARDED, signals.SIGWINCH, signals.SIGTSTP))
        self.pump.wakeup_fd = self.wakeup.fd
        self.pump.on_wakeup = self._take_signals

    def run(self, deadline_s: float | None) -> int:
        """Relays until the end; the exit status. Raises VshError; the terminal is restored in every case."""
        if self.terminal is not None:
            self.terminal.enter()
        try:
            end = self.pump.run(deadline_s)
        finally:
            if self.terminal is not None:
                self.terminal.leave()
            self.session.close()
        return SIGNALLED + end.signal if end.signal else end.code & 0xFF

    def obey(self, command: str) -> None:
        """Does what an escape asked for."""
        if command == escapes.DISCONNECT:
            raise ConnectionLost(f"disconnected from {self.session.name}")
        if command == escapes.SUSPEND:
            self._suspend()
        else:
            os.write(2, escapes.HELP.replace("\n", "\r\n").encode())

    def _take_signals(self) -> None:
        for number in self.wakeup.take():
            if number == signals.SIGWINCH:
                self._send_size()
            elif number == signals.SIGTSTP:
                self._suspend()
            elif number in signals.FORWARDED:
                self.session.connection.send_signal(number)

    def _send_size(self) -> None:
        rows, cols = find_size()
        if self.has_pty and rows:
            self.session.connection.send_resize(rows, cols)

    def _suspend(self) -> None:
        """Stops this process, with the terminal as it was and the server forewarned."""
        self.session.connection.send_hold()
        self.session.flush()
        if self.terminal is not None:
            self.terminal.leave()
        signals.stop_self()
        if self.terminal is not None:
            self.terminal.enter()
        self._send_size()
        self.session.connection.send_alive()


class TypedSource(Source):
    """stdin of a terminal, with the escapes taken out of it."""

    def __init__(self, source: Source, shell: Shell) -> None:
        self._source = source
        self._shell = shell
        self._filter = escapes.EscapeFilter()
        self.fd = source.fd

    def read(self, limit: int) -> bytes | None:
        # One byte of room is kept for an escape character that turns out to be none.
        data = self._source.read(max(1, limit - 1))
        if not data:
            return None if data is None else b""
        typed, commands = self._filter.feed(bytes(data))
        for command in commands:
            self._shell.obey(command)
        return typed or None
