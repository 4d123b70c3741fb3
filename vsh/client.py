"""vsh for programs: run a command in a VM and get its output, stream it, or hold a session and drive it by hand.

    client = Client(Address.hybrid("/run/vm/vsock.sock"))
    result = client.run(["uname", "-a"], text=True, check=True)
    print(result.stdout)
    with client.popen(["tail", "-f", "/var/log/messages"], text=True) as process:
        for line in process.stdout:
            print(line)

Every session has a connection of its own. A Client is an address with options, and holds nothing open.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import AnyStr, BinaryIO, Generic, Literal, Self, TextIO, TypedDict, Unpack, overload

from vsh.address import Address
from vsh.defaults import fill_request
from vsh.errors import CommandFailed, ConnectionLost, UsageError
from vsh.memory import BytesSource, CaptureSink
from vsh.process import PIPE, SIGNALLED, Process, Stream, Wiring
from vsh.pump import Pump, deadline_after
from vsh.session import Session, make_limits, open_session
from vshd.wire import messages
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.requests import Lasting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.lasting.handle import LastingProcess

Argv = Sequence[str | bytes]

# Long enough for a guest under emulation on a busy machine.
CONNECT_TIMEOUT_S = 30.0
# A command's output is kept in memory: more than this is a mistake, or a stream.
OUTPUT_LIMIT_BYTES = 256 << 20
# Of a failed command's stderr, an error shows the end.
SHOWN_STDERR_LINES = 10
# The command of Executor.exists: the path follows it.
EXISTS = ("sh", "-c", 'test -e "$1" || test -L "$1"', "sh")


class RunOptions(TypedDict, total=False):
    """The options of run() except text, for code that passes them on."""

    env: Mapping[str, str] | None
    cwd: str
    user: str
    input: bytes | str | None
    encoding: str
    errors: str
    check: bool
    timeout: float | None
    output_limit_bytes: int


class PopenOptions(TypedDict, total=False):
    """The options of popen() except text, for code that passes them on."""

    stdin: Stream
    stdout: Stream
    stderr: Stream
    env: Mapping[str, str] | None
    cwd: str
    user: str
    size: tuple[int, int] | None
    encoding: str
    errors: str
    timeout: float | None


class OpenOptions(TypedDict, total=False):
    """The options of open() except encoding, for code that passes them on."""

    errors: str | None
    newline: str | None
    user: str


class Result(Generic[AnyStr]):
    """The result of a command: its output, its exit status (128+N when signal N killed it), and that signal or 0."""

    __slots__ = ("args", "exit", "signal", "stderr", "stdout")

    def __init__(self, args: list[str | bytes], stdout: AnyStr, stderr: AnyStr, exit_status: int, signal: int) -> None:
        self.args = args
        self.stdout: AnyStr = stdout
        self.stderr: AnyStr = stderr
        self.exit = exit_status
        self.signal = signal

    def __repr__(self) -> str:
        return f"Result(exit={self.exit}, stdout={self.stdout!r}, stderr={self.stderr!r})"

    @property
    def returncode(self) -> int:
        """The exit status in subprocess's form: -N when signal N killed the command."""
        return -self.signal if self.signal else self.exit

    def check(self) -> Self:
        """Returns itself. Raises CommandFailed unless the exit status is 0."""
        if not self.exit:
            return self
        words = " ".join(shlex.quote(os.fsdecode(word)) for word in self.args)
        how = f"was killed by signal {self.signal}" if self.signal else f"exited with status {self.exit}"
        text = self.stderr.decode(errors="replace") if isinstance(self.stderr, bytes) else self.stderr
        tail = "\n".join(text.splitlines()[-SHOWN_STDERR_LINES:])
        raise CommandFailed(f"the command {how}: {words}", result=self, details=tail, status=self.exit)


class Client:
    """Runs commands through one vshd. As a with-block it closes what it may hold open; today that is nothing."""

    __slots__ = ("_address", "_container", "_is_extended", "_timeout_s")

    def __init__(
        self, address: Address, *, timeout_s: float = CONNECT_TIMEOUT_S, extended: bool = True, container: str = ""
    ) -> None:
        """timeout_s: for connecting and starting a command. extended: False keeps to ChromeOS's protocol. container:
        run commands in this container of the guest (see `vmkit container`).
        """
        self._container = container
        self._address = address
        self._timeout_s = timeout_s
        self._is_extended = extended

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes what the client holds open. Sessions and processes have connections of their own."""

    @overload
    def run(self, argv: Argv, *, text: Literal[True], **options: Unpack[RunOptions]) -> Result[str]: ...

    @overload
    def run(self, argv: Argv, *, text: Literal[False] = False, **options: Unpack[RunOptions]) -> Result[bytes]: ...

    @overload
    def run(self, argv: Argv, *, text: bool = False, **options: Unpack[RunOptions]) -> Result[bytes] | Result[str]: ...

    def run(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        input: bytes | str | None = None,
        text: bool = False,
        encoding: str = "utf-8",
        errors: str = "replace",
        check: bool = False,
        timeout: float | None = None,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Result[bytes] | Result[str]:
        """Runs a command to its end, in the shape of subprocess.run; both outputs are always captured.

        argv: a list of words. input: the command's stdin; a str is encoded. text: the outputs are str, decoded by
        encoding and errors. check: raise CommandFailed unless the exit status is 0. timeout: seconds for the whole
        command; at the deadline vsh ends its processes.

        Raises ExecError when the command could not be executed, ConnectionLost, TimedOut, CommandFailed, UsageError,
        VshError.
        """
        words = _check_argv(argv, "run")
        deadline_s = deadline_after(timeout)
        data = input.encode(encoding) if isinstance(input, str) else input or b""
        sinks = {messages.STDOUT: CaptureSink(output_limit_bytes), messages.STDERR: CaptureSink(output_limit_bytes)}
        with self.open_session(words, env=env, cwd=cwd, user=user, timeout_s=timeout) as session:
            try:
                end = Pump(session, BytesSource(data), dict(sinks)).run(deadline_s)
            except ConnectionLost as error:
                session.explain(error)
                raise
        status = SIGNALLED + end.signal if end.signal else end.code
        stdout, stderr = sinks[messages.STDOUT].take(), sinks[messages.STDERR].take()
        result: Result[bytes] | Result[str] = Result(words, stdout, stderr, status, end.signal)
        if text:
            result = Result(words, stdout.decode(encoding, errors), stderr.decode(encoding, errors), status, end.signal)
        return result.check() if check else result

    @overload
    def popen(self, argv: Argv, *, text: Literal[True], **options: Unpack[PopenOptions]) -> Process[str]: ...

    @overload
    def popen(self, argv: Argv, *, text: Literal[False] = False, **options: Unpack[PopenOptions]) -> Process[bytes]: ...

    @overload
    def popen(
        self, argv: Argv, *, text: bool = False, **options: Unpack[PopenOptions]
    ) -> Process[bytes] | Process[str]: ...

    def popen(
        self,
        argv: Argv,
        *,
        stdin: Stream = PIPE,
        stdout: Stream = PIPE,
        stderr: Stream = PIPE,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        size: tuple[int, int] | None = None,
        text: bool = False,
        encoding: str = "utf-8",
        errors: str = "replace",
        timeout: float | None = None,
    ) -> Process[bytes] | Process[str]:
        """Starts a command and returns at once, in the shape of subprocess.Popen; use it as a with-block.

        stdin, stdout, stderr: PIPE (a file of the returned process), DEVNULL, an open file or a descriptor; stderr
        also STDOUT. size: rows and columns of a terminal; its one output is stdout. None: pipes. text: the files are
        text files. timeout: seconds for connecting and starting.

        Raises ExecError when the command could not be executed, UsageError, VshError.
        """
        words = _check_argv(argv, "popen")
        wiring = Wiring(stdin, stdout, stderr)
        try:
            session = self.open_session(words, env=env, cwd=cwd, user=user, size=size, timeout_s=timeout)
            try:
                process = Process[str] if text else Process[bytes]
                return process(
                    words, session, wiring, has_pty=size is not None, text=text, encoding=encoding, errors=errors
                )
            except BaseException:
                session.close()
                raise
        except BaseException:
            wiring.close()
            raise

    def start(
        self,
        argv: Argv,
        *,
        name: str = "",
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        size: tuple[int, int] | None = None,
        output_size: int = 0,
        output_file: str = "",
    ) -> "LastingProcess":
        """Starts a command that outlives this program, as `vsh --detach` does, and returns at once.

        name: serves wherever an id does. size: rows and columns of a terminal; None: pipes. output_size: how many bytes
        of output vshd keeps, 0 for its own choice. output_file: a new file of the guest for them, instead of memory.

        Raises ExecError when the command could not be executed, or with the kind BUSY when the name is in use;
        UsageError, VshError.
        """
        from vsh.lasting import calls  # noqa: PLC0415  (most programs wait for their commands)
        from vsh.lasting.handle import LastingProcess  # noqa: PLC0415

        request = _make_request(_check_argv(argv, "start"), env, cwd, user, size)
        self._enter_container(request)
        lasting = Lasting(name=os.fsencode(name), size=output_size, file=os.fsencode(output_file))
        session = calls.start(self._address, request, lasting, timeout_s=self._timeout_s)
        # The guest's session is crun's, which runs as root for every user of a container.
        user = "root" if self._container else user
        return LastingProcess(self._address, session, user=user, timeout_s=self._timeout_s)

    def attach(self, session: str, *, user: str = "") -> "LastingProcess":
        """The session of an id or a name that start() or `vsh --detach` has started.

        user: whose session. Asks the guest nothing yet, so this never fails.
        """
        from vsh.lasting.handle import LastingProcess  # noqa: PLC0415  (see start)

        return LastingProcess(self._address, session, user=user, timeout_s=self._timeout_s)

    def sessions(self, *, user: str = "") -> "list[LastingProcess]":
        """The sessions that outlive their clients, the oldest first; those of all users for root. Raises VshError."""
        from vsh.lasting import calls  # noqa: PLC0415  (see start)

        records = calls.read_sessions(self._address, user=user, timeout_s=self._timeout_s)
        return [self.attach(record.id.decode("ascii", "replace"), user=user) for record in records]

    def push(self, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str = "") -> None:
        """Copies a file or a directory of the host to the guest's path `destination`, whose directory must exist.

        Raises UsageError for a source that is missing, VshError when the guest's tar fails.
        """
        from vsh import archive  # noqa: PLC0415  (most programs copy nothing)

        archive.push(self, os.fspath(source), os.fspath(destination), user=user)

    def pull(self, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str = "") -> None:
        """Copies a file or a directory of the guest to the host's path `destination`.

        The copy appears there whole. Raises UsageError, VshError; an old destination is unchanged after an error.
        """
        from vsh import archive  # noqa: PLC0415  (most programs copy nothing)

        archive.pull(self, os.fspath(source), os.fspath(destination), user=user)

    @overload
    def open(self, path: str | bytes, mode: str = "r", *, encoding: str, **options: Unpack[OpenOptions]) -> TextIO: ...

    @overload
    def open(
        self, path: str | bytes, mode: str = "r", *, encoding: None = None, **options: Unpack[OpenOptions]
    ) -> BinaryIO: ...

    @overload
    def open(
        self, path: str | bytes, mode: str = "r", *, encoding: str | None = None, **options: Unpack[OpenOptions]
    ) -> BinaryIO | TextIO: ...

    def open(
        self,
        path: str | bytes,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        user: str = "",
    ) -> BinaryIO | TextIO:
        """Opens a file of the guest as a file object, in the shape of open(); use it as a with-block.

        mode: r, w, x or a, with + for both ways. The data is bytes; with an encoding it is text, and errors and newline
        are those of open(). A relative path begins at the user's home. The file has a connection of its own.

        Raises OSError as open() does; UsageError for a mode, ExecError for a user, VshError for the connection.
        """
        from vsh.remotefile import open_file  # noqa: PLC0415  (most programs open nothing)

        if self._container:
            raise UsageError("open() opens files of a guest, and not of a container in it", hint="use run() or pull()")

        return open_file(
            self._address,
            path,
            mode,
            user=user,
            encoding=encoding,
            errors=errors,
            newline=newline,
            timeout_s=self._timeout_s,
        )

    def exists(self, path: str, *, user: str = "") -> bool:
        """Whether the guest has a file of any kind at this path. A link counts, wherever it leads."""
        return self.run([*EXISTS, path], user=user).exit == 0

    def open_session(
        self,
        argv: Argv,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        size: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Session:
        """Starts a session, to be driven by a Pump or by hand. Use it as a with-block.

        argv: empty for a login shell. size: rows and columns of a pty; None for pipes.
        """
        request = _make_request(argv, env, cwd, user, size)
        self._enter_container(request)
        limits = make_limits() if self._is_extended else None
        wait_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        return open_session(self._address, request, limits=limits, timeout_s=wait_s)

    def _enter_container(self, request: SetupConnectionRequest) -> None:
        """Completes a request: for the client's container, or with what the guest's own sessions have."""
        entry = self._address.entry
        if not self._container:
            fill_request(request, entry)
            return
        from vsh.crun import enter_container  # noqa: PLC0415  (most commands are the guest's)

        enter_container(request, self._container, "" if entry is None else entry.name)


def _make_request(
    argv: Argv, env: Mapping[str, str] | None, cwd: str, user: str, size: tuple[int, int] | None
) -> SetupConnectionRequest:
    return SetupConnectionRequest(
        target=messages.VM_SHELL,
        user=os.fsencode(user),
        env={os.fsencode(name): os.fsencode(value) for name, value in (env or {}).items()},
        argv=[os.fsencode(word) for word in argv],
        window_rows=size[0] if size else 0,
        window_cols=size[1] if size else 0,
        nopty=size is None,
        cwd=os.fsencode(cwd),
    )


def _check_argv(argv: Argv, call: str) -> list[str | bytes]:
    """Returns a command's words. Raises UsageError for a string, which would become letters, and for no words."""
    if isinstance(argv, str | bytes):
        text = os.fsdecode(argv)
        raise UsageError(
            f"{call}() needs a list of words, not the string {text!r}",
            hint=f'write {call}({shlex.split(text)!r}), or {call}(["sh", "-c", {text!r}]) for a shell\'s syntax',
        )
    words = list(argv)
    if not words:
        raise UsageError(f"{call}() needs a command", hint="a login shell is open_session([])")
    for word in words:
        if not isinstance(word, str | bytes):
            raise UsageError(f"{call}() needs words of type str or bytes, not {word!r}")
    return words
