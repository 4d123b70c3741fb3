"""A command in a guest with file-like streams, in the shape of subprocess.Popen.

Owns one session and the thread that pumps it. A pipe joins each stream of the target to a file of the caller, so that
a stalled reader holds up its own stream alone. Knows nothing of how a session is opened: vsh.client does that.
"""

import io
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import IO, AnyStr, Generic, Self, cast

from vsh import forks
from vsh.errors import ConnectionLost, UsageError, VshError
from vsh.memory import BytesSource, NullSink
from vsh.pump import Pump, Sink, Source, TimedOut, deadline_after
from vsh.session import Session
from vsh.stdio import FdSink, FdSource
from vshd.wire import messages
from vshd.wire.events import Event

# The numbers of subprocess, so that either module's names work.
PIPE = subprocess.PIPE
STDOUT = subprocess.STDOUT
DEVNULL = subprocess.DEVNULL
# docs/reference/protocol.md: a shell's status for a target that a signal ended.
SIGNALLED = 128
# The pump's thread ends at once when its session is closed.
CLOSE_TIMEOUT_S = 10.0

Stream = int | IO[bytes] | IO[str] | None


class Wiring:
    """The descriptors of one process: the pump's, and those for the caller. Invariant: each is closed once."""

    def __init__(self, stdin: Stream, stdout: Stream, stderr: Stream) -> None:
        """Raises UsageError for a stream that is not a file, a descriptor, PIPE, STDOUT or DEVNULL."""
        self.ours: list[int] = []
        self._ends: list[FdSource | FdSink] = []
        self.theirs: dict[str, int] = {}
        try:
            self.source = self._open_source(stdin)
            out = self._open_output("stdout", stdout)
            err = out if stderr == STDOUT else self._open_output("stderr", stderr)
            self.sinks = {messages.STDOUT: self._open_sink(out), messages.STDERR: self._open_sink(err)}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes all descriptors that the caller has not taken."""
        self.close_ours()
        for fd in self.theirs.values():
            os.close(fd)
        self.theirs.clear()

    def close_ours(self) -> None:
        """Closes the pump's ends: the caller's files see the end of their streams."""
        for end in self._ends:
            end.close()
            # A pipe or terminal was opened a second time, and some kinds stay open until the program's end.
            if end.fd >= 0 and end.fd not in self.ours:
                os.close(end.fd)
        self._ends.clear()
        while self.ours:
            os.close(self.ours.pop())

    def _open_source(self, stream: Stream) -> Source:
        if stream in (None, DEVNULL):
            return BytesSource(b"")
        if stream == PIPE:
            reading, self.theirs["stdin"] = os.pipe()
        else:
            reading = os.dup(_descriptor_of("stdin", stream))
        self.ours.append(reading)
        source = FdSource(reading)
        self._ends.append(source)
        return source

    def _open_output(self, name: str, stream: Stream) -> int:
        """Returns the descriptor that gets a stream of the target; -1 for a stream that is thrown away."""
        if stream in (None, DEVNULL):
            return -1
        if stream == PIPE:
            self.theirs[name], writing = os.pipe()
        else:
            writing = os.dup(_descriptor_of(name, stream))
        self.ours.append(writing)
        return writing

    def _open_sink(self, fd: int) -> Sink:
        if fd < 0:
            return NullSink()
        # stdout and stderr may share one pipe, and the end of one stream is not the end of the other.
        writing = os.dup(fd)
        self.ours.append(writing)
        sink = FdSink(writing)
        self._ends.append(sink)
        return sink


class Process(Generic[AnyStr]):
    """One command of a guest, running or ended.

    stdin, stdout, stderr: files where PIPE was asked for, else None; text files when the process was opened with
    text=True. pid: the target's process id in the guest, 0 when the server does not send it. returncode: None while
    the command runs, then its exit status, or -N when signal N ended it, as in subprocess. exit: as in Result, with
    128+N for signal N.
    """

    def __init__(
        self,
        args: list[str | bytes],
        session: Session,
        wiring: Wiring,
        *,
        has_pty: bool,
        text: bool,
        encoding: str,
        errors: str,
    ) -> None:
        self.args = args
        self.pid = session.pid
        self.returncode: int | None = None
        self._session = session
        self._wiring = wiring
        self._owner_pid = os.getpid()
        self._failure: BaseException | None = None
        self._has_exit = threading.Event()
        self._ended = threading.Event()
        self._moves: deque[Callable[[], None]] = deque()
        self._wake_reading, self._wake_writing = os.pipe()
        os.set_blocking(self._wake_reading, False)
        os.set_blocking(self._wake_writing, False)
        self._lock = threading.Lock()
        self._collectors: dict[str, _Collector] = {}

        def take(name: str, mode: str) -> IO[AnyStr] | None:
            fd = wiring.theirs.pop(name, -1)
            if fd < 0:
                return None
            file = open(fd, mode)  # noqa: SIM115  (the caller's, or __exit__'s)
            return cast(IO[AnyStr], io.TextIOWrapper(file, encoding, errors) if text else file)

        self.stdin: IO[AnyStr] | None = take("stdin", "wb")
        self.stdout: IO[AnyStr] | None = take("stdout", "rb")
        self.stderr: IO[AnyStr] | None = take("stderr", "rb")
        self._pump = _ProcessPump(session, wiring, self._note_exit, has_pty=has_pty)
        self._pump.wakeup_fd = self._wake_reading
        self._pump.on_wakeup = self._obey
        forks.hold(self)
        # A program that ends without waiting ends its sessions with it, and the server ends their targets.
        self._thread = threading.Thread(target=self._run, name="vsh-process", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files and waits. After an exception, kills the command first. Does nothing in a forked child."""
        if os.getpid() != self._owner_pid:
            return
        if kind is not None:
            self.kill()
        for file in (self.stdout, self.stderr, self.stdin):
            if file is not None:
                try:
                    file.close()
                except BrokenPipeError:
                    pass  # what stdin still held: the target has ended without it
        try:
            if kind is None:
                self.wait()
        finally:
            # With the caller's files closed, the pump has nothing left to deliver.
            self._thread.join(CLOSE_TIMEOUT_S)

    def __repr__(self) -> str:
        return f"<Process args={self.args!r} pid={self.pid} returncode={self.returncode}>"

    @property
    def exit(self) -> int | None:
        """None while the command runs, then its exit status; 128+N when signal N ended it."""
        code = self.returncode
        return SIGNALLED - code if code is not None and code < 0 else code

    @property
    def signal(self) -> int:
        """The number of the signal that ended the command, or 0."""
        return -self.returncode if self.returncode is not None and self.returncode < 0 else 0

    def poll(self) -> int | None:
        """Returns returncode; None while the command runs. Raises ConnectionLost when the session ended early."""
        self._raise_failure()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the command's end, timeout seconds at most; returns returncode.

        Raises TimedOut (the command goes on), ConnectionLost, VshError.
        """
        if not self._has_exit.wait(timeout):
            raise TimedOut(f"the command did not end within {timeout:g} s", hint="kill() ends it")
        self._raise_failure()
        assert self.returncode is not None
        return self.returncode

    def communicate(
        self, input: AnyStr | None = None, timeout: float | None = None
    ) -> "tuple[AnyStr | None, AnyStr | None]":
        """Writes input, closes stdin, reads both outputs to their ends, waits; returns stdout and stderr.

        Raises TimedOut after timeout seconds (the command goes on; a second call continues), ConnectionLost, VshError.
        """
        if not self._collectors:
            self._collectors = {
                name: _Collector(file.read)
                for name, file in (("stdout", self.stdout), ("stderr", self.stderr))
                if file is not None
            }
            if self.stdin is not None:
                self._collectors["stdin"] = _Collector(lambda: self._feed(input))
        deadline = _Deadline(timeout)
        for collector in self._collectors.values():
            if not collector.wait(deadline.left()):
                raise TimedOut(f"the command did not end within {timeout:g} s", hint="kill() ends it")
        self.wait(deadline.left())
        self._thread.join(CLOSE_TIMEOUT_S)
        found = {name: cast("AnyStr | None", collector.result) for name, collector in self._collectors.items()}
        return found.get("stdout"), found.get("stderr")

    def send_signal(self, number: int) -> None:
        """Sends a signal to the command's process group; does nothing once the command has ended.

        Raises UsageError for a signal that a legacy server cannot take: ChromeOS's protocol has only SIGHUP, SIGINT,
        SIGQUIT and SIGTERM.
        """
        if self.returncode is None and not self._session.connection.can_signal(number):
            raise UsageError(f"this guest's vshd cannot send signal {number}: it speaks ChromeOS's protocol")
        self._do(lambda: self._session.send_signal(number))

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL. A legacy server cannot send it, so this closes the session, and the server ends the target."""
        if self._session.connection.can_signal(signal.SIGKILL):
            self.send_signal(signal.SIGKILL)
        else:
            self._do(self._pump.give_up)

    def resize(self, rows: int, cols: int) -> None:
        """Sets the size of the command's terminal, in characters."""
        self._do(lambda: self._session.connection.send_resize(rows, cols))

    def let_go(self) -> None:
        """Closes a forked child's copies of the pipes. The files stay open on /dev/null, so that the text in their
        buffers is not written a second time."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None and not file.closed:
                os.dup2(null, file.fileno(), inheritable=False)
        os.close(null)
        if not self._ended.is_set():
            self._wiring.close_ours()
            os.close(self._wake_reading)
            os.close(self._wake_writing)
        if self.returncode is None:
            self._failure = VshError("the command belongs to the process that this one was forked from")
        # New ones: the pump's thread is not here, and may have held their locks.
        self._lock = threading.Lock()
        self._ended = self._has_exit = threading.Event()
        self._ended.set()

    # The pump's thread.

    def _run(self) -> None:
        try:
            self._pump.run()
        except BaseException as error:
            if isinstance(error, ConnectionLost):
                self._session.explain(error)
            if self.returncode is None:
                self._failure = error
        finally:
            with self._lock:
                self._session.close()
                self._ended.set()
                os.close(self._wake_reading)
                os.close(self._wake_writing)
            self._wiring.close_ours()
            self._has_exit.set()

    def _note_exit(self, code: int, number: int) -> None:
        """Notes the target's end. Some of its output may still be on its way."""
        self.returncode = -number if number else code
        self._has_exit.set()

    def _obey(self) -> None:
        try:
            os.read(self._wake_reading, 512)
        except BlockingIOError:
            pass
        while self._moves:
            self._moves.popleft()()

    # The caller's thread.

    def _do(self, move: Callable[[], object]) -> None:
        """Runs `move` in the pump's thread, which alone uses the connection."""
        with self._lock:
            if self._ended.is_set():
                return
            self._moves.append(lambda: (move(), None)[1])
            try:
                os.write(self._wake_writing, b"!")
            except BlockingIOError:
                pass  # enough wake-ups are waiting

    def _feed(self, data: AnyStr | None) -> None:
        stdin = self.stdin
        assert stdin is not None
        try:
            if data:
                stdin.write(data)
            stdin.close()
        except BrokenPipeError:
            pass  # the target has closed its stdin, or ended

    def _raise_failure(self) -> None:
        if self._has_exit.is_set() and self.returncode is None and self._failure is not None:
            if isinstance(self._failure, VshError):
                raise self._failure.with_traceback(None)
            raise VshError(f"the session ended: {self._failure!r}") from self._failure


class _ProcessPump(Pump):
    """A pump that announces the target's exit before the last output is delivered."""

    def __init__(self, session: Session, wiring: Wiring, on_exit: Callable[[int, int], None], *, has_pty: bool) -> None:
        super().__init__(session, wiring.source, wiring.sinks, has_pty=has_pty)
        self._on_exit = on_exit

    def give_up(self) -> None:
        """Ends the session without an exit."""
        raise VshError("the guest's vshd cannot send signals, so kill() closed the command's session")

    def _handle(self, event: Event) -> None:
        super()._handle(event)
        if self.exit is not None and self._on_exit is not None:
            self._on_exit(self.exit.code, self.exit.signal)


class _Collector:
    """Runs one blocking call in a thread of its own. A caller can wait for its result."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.result: object = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="vsh-communicate", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None) -> bool:
        """Whether the call has ended within timeout seconds. Raises the call's own error."""
        self._thread.join(timeout)
        if self._failure is not None:
            raise self._failure
        return not self._thread.is_alive()

    def _run(self, call: Callable[[], object]) -> None:
        try:
            self.result = call()
        except BaseException as error:
            self._failure = error


class _Deadline:
    """A limit shared by several waits."""

    def __init__(self, timeout: float | None) -> None:
        self._end_s = deadline_after(timeout)

    def left(self) -> float | None:
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())


def _descriptor_of(name: str, stream: Stream) -> int:
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    try:
        return cast("IO[bytes]", stream).fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise UsageError(
            f"{name} must be PIPE, DEVNULL, an open file or a descriptor, not {stream!r}",
            hint="bytes in memory: run(..., input=...), or communicate()",
        ) from error
