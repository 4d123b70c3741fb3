"""A lasting session for programs: start, poll, write, signal and wait, each over a connection of its own."""

import os
import signal
from collections.abc import Callable

from vsh.address import Address
from vsh.errors import ConnectionLost, UsageError, VshError
from vsh.lasting import calls
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump, Sink, deadline_after
from vsh.session import Session
from vshd.wire import messages
from vshd.wire.events import Positioned
from vshd.wire.kept import SessionRecord
from vshd.wire.requests import Attach

# More than a session in memory keeps.
OUTPUT_LIMIT_BYTES = 256 << 20


class LastingOutput:
    """A part of a session's output. `offset` is that of the next byte; `dropped` bytes before this part are gone."""

    __slots__ = ("dropped", "offset", "stderr", "stdout")

    def __init__(self, stdout: bytes, stderr: bytes, offset: int, dropped: int) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.offset = offset
        self.dropped = dropped

    def __repr__(self) -> str:
        return (
            f"LastingOutput(stdout={self.stdout!r}, stderr={self.stderr!r}, "
            f"offset={self.offset}, dropped={self.dropped})"
        )


class LastingProcess:
    """A session that outlives this program. It holds nothing open, and need not be closed.

    `id` is the session's id, or the name that attach() was given.
    """

    __slots__ = ("_address", "_timeout_s", "_user", "id")

    def __init__(self, address: Address, session: str, *, user: str = "", timeout_s: float = 30.0) -> None:
        """timeout_s: for each connection."""
        self.id = session
        self._address = address
        self._user = user
        self._timeout_s = timeout_s

    def __repr__(self) -> str:
        return f"LastingProcess({self.id!r})"

    def look(self) -> SessionRecord:
        """What vshd knows of the session: times, status, offsets. Raises VshError."""
        records = calls.read_sessions(self._address, user=self._user, timeout_s=self._timeout_s)
        # A name is this user's own, and an id is one session's alone.
        wanted = os.fsencode(self.id)
        for record in records:
            if wanted in (record.id, record.name):
                return record
        raise VshError(f"no session has the id or name '{self.id}'")

    def poll(self) -> int | None:
        """The status in subprocess's form, -N when signal N killed the command; None while it runs. Raises VshError."""
        record = self.look()
        if not record.has_ended:
            return None
        return -record.signal if record.signal else record.code

    def read(self, since: int = 0, *, limit_bytes: int = OUTPUT_LIMIT_BYTES) -> LastingOutput:
        """The output that is kept, from offset `since` on; does not wait for more. Raises VshError."""
        sinks = {messages.STDOUT: CaptureSink(limit_bytes), messages.STDERR: CaptureSink(limit_bytes)}
        session, _ = self._open(messages.OUTPUT, since=since)
        with session:
            self._run(session, b"", dict(sinks), None)
            connection = session.connection
            stdout, stderr = sinks[messages.STDOUT].take(), sinks[messages.STDERR].take()
            return LastingOutput(stdout, stderr, connection.offset, connection.dropped)

    def write(self, data: bytes, *, close: bool = False, steal: bool = False, timeout: float | None = None) -> None:
        """Gives data to the command's stdin, and returns when it has taken all.

        close: closes its stdin behind that. steal: takes the place of another client that writes. timeout: in seconds;
        the command may have taken a part then.

        Raises ExecError whose kind is BUSY when another client writes, TimedOut, VshError.
        """
        session, _ = self._open(messages.INPUT, closes=close, steal=steal)
        with session:
            self._run(session, data, {}, timeout)

    def signal(self, number: int) -> None:
        """Sends a signal to the processes of the session. Raises VshError."""
        if not 0 < number <= messages.SIGNAL_MAX:
            raise UsageError(f"signal() needs a number from 1 to {messages.SIGNAL_MAX}, not {number!r}")
        calls.send_signal(self._address, self.id, int(number), user=self._user, timeout_s=self._timeout_s)

    def terminate(self) -> None:
        """Sends SIGTERM. Raises VshError."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL. Raises VshError."""
        self.signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the command has ended; the status as poll() has it. Can be called again.

        timeout: in seconds. Raises TimedOut, ConnectionLost, VshError; the session goes on.
        """
        session, _ = self._open(messages.WAIT)
        with session:
            return self._run(session, b"", {}, timeout)

    def follow(self, on_output: Callable[[bytes], None], *, since: int = 0, timeout: float | None = None) -> int:
        """Calls on_output with the output of both streams, as it comes, until the session ends; the status as poll().

        Raises TimedOut, ConnectionLost, VshError; the session goes on.
        """
        sink = _CallingSink(on_output)
        session, _ = self._open(messages.FOLLOW, since=since)
        with session:
            return self._run(session, b"", {messages.STDOUT: sink, messages.STDERR: sink}, timeout)

    def forget(self) -> None:
        """Forgets the ended session, with its output. Raises ExecError whose kind is BUSY while it runs, VshError."""
        calls.forget(self._address, self.id, user=self._user, timeout_s=self._timeout_s)

    def _open(
        self, mode: int, *, since: int = 0, closes: bool = False, steal: bool = False
    ) -> tuple[Session, Positioned]:
        attach = Attach(
            session=os.fsencode(self.id),
            user=os.fsencode(self._user),
            mode=mode,
            since=since,
            closes=closes,
            steal=steal,
        )
        return calls.open_attached(self._address, attach, timeout_s=self._timeout_s)

    def _run(self, session: Session, data: bytes, sinks: dict[int, Sink], timeout: float | None) -> int:
        pump = Pump(session, BytesSource(data), sinks)
        pump.parting = "the session goes on"
        try:
            end = pump.run(deadline_after(timeout))
        except ConnectionLost as error:
            session.explain(error)
            raise
        return -end.signal if end.signal else end.code


class _CallingSink(Sink):
    """Gives all that comes to a function."""

    def __init__(self, call: Callable[[bytes], None]) -> None:
        self._call = call

    def write(self, pieces: list[memoryview | bytes]) -> int:
        data = b"".join(pieces)
        self._call(data)
        return len(data)
