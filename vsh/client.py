"""vsh for programs: run a command in a VM and get its output, or hold a session and stream.

    client = Client.connect(Address.hybrid("/run/vm/vsock.sock"))
    result = client.run(["uname", "-a"])
    result.stdout, result.stderr, result.exit, result.signal

Every session has a connection of its own; a Client is an address and a way to speak to it, and holds nothing open.
"""

import os
from collections.abc import Mapping, Sequence

from vsh.address import Address
from vsh.errors import VshError
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump, deadline_after
from vsh.session import Session, make_limits, open_session
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest

# Long enough for a guest under emulation on a busy machine.
CONNECT_TIMEOUT_S = 30.0
# A command's output is kept in memory: more than this is a mistake, or a stream.
OUTPUT_LIMIT_BYTES = 256 << 20
SIGNALLED = 128


class Result:
    """What a command left: its output, its exit status (128+N when signal N killed it), and that signal or 0."""

    __slots__ = ("exit", "signal", "stderr", "stdout")

    def __init__(self, stdout: bytes, stderr: bytes, exit_status: int, signal: int) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.exit = exit_status
        self.signal = signal

    def __repr__(self) -> str:
        return f"Result(exit={self.exit}, stdout={self.stdout!r}, stderr={self.stderr!r})"


class Client:
    """A way to one vshd."""

    __slots__ = ("_address", "_is_extended", "_timeout_s")

    def __init__(self, address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S, extended: bool = True) -> None:
        """timeout_s: for connecting and starting a command. extended: False keeps to ChromeOS's protocol."""
        self._address = address
        self._timeout_s = timeout_s
        self._is_extended = extended

    @classmethod
    def connect(cls, address: Address, timeout_s: float = CONNECT_TIMEOUT_S) -> "Client":
        """A client of `address`; connections are made by the sessions."""
        return cls(address, timeout_s=timeout_s)

    def run(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        input: bytes = b"",
        timeout_s: float | None = None,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Result:
        """Runs a command to its end. timeout_s: for the whole command; its processes are ended when it is over.

        Raises ExecError when it could not be executed, ConnectionLost, TimedOut, VshError.
        """
        if not argv:
            raise VshError("run() needs a command", hint="a login shell is open_session([])")
        deadline_s = deadline_after(timeout_s)
        session = self.open(argv, env=env, cwd=cwd, user=user, timeout_s=timeout_s)
        sinks = {messages.STDOUT: CaptureSink(output_limit_bytes), messages.STDERR: CaptureSink(output_limit_bytes)}
        try:
            end = Pump(session, BytesSource(input), dict(sinks)).run(deadline_s)
        finally:
            session.close()
        status = SIGNALLED + end.signal if end.signal else end.code & 0xFF
        return Result(sinks[messages.STDOUT].take(), sinks[messages.STDERR].take(), status, end.signal)

    def open(
        self,
        argv: Sequence[str | bytes],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        size: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Session:
        """A running session, to be driven by a Pump or by hand, and closed by the caller.

        argv: empty for a login shell. size: rows and columns of a pty; None for pipes.
        """
        request = SetupConnectionRequest(
            target=messages.VM_SHELL,
            user=os.fsencode(user),
            env={os.fsencode(name): os.fsencode(value) for name, value in (env or {}).items()},
            argv=[os.fsencode(word) for word in argv],
            window_rows=size[0] if size else 0,
            window_cols=size[1] if size else 0,
            nopty=size is None,
            cwd=os.fsencode(cwd),
        )
        limits = make_limits() if self._is_extended else None
        wait_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        return open_session(self._address, request, limits=limits, timeout_s=wait_s)
