"""The messages of docs/reference/protocol.md sections 1.2 and 2.2: their numbers, and objects that turn
into bytes and back.

Owns names and field numbers. Knows proto3 only through vshd.wire.proto3, and nothing of frames, order or connections.
Strings are bytes here: what execve() takes travels unchanged.
"""

from vshd.wire.proto3 import (
    BOOL,
    BYTES,
    BYTES_LIST,
    BYTES_MAP,
    INT32,
    MESSAGE,
    SINT32,
    UINT32,
    UINT64,
    Field,
    Message,
    Oneof,
)
from vshd.wire.requests import (
    Attach,
    Clock,
    Cores,
    Forward,
    Freeze,
    Lasting,
    Logs,
    Ports,
    PowerOff,
    Share,
    Subsystem,
    Thaw,
    Units,
)

# ConnectionStatus
UNKNOWN, READY, EXITED, FAILED = 0, 1, 2, 3
# StdioStream
STDIN, STDOUT, STDERR = 1, 2, 3
STREAM_NAMES = ("invalid", "stdin", "stdout", "stderr")
# Signal: the only ones legacy mode knows; the numbers are Linux's.
LEGACY_SIGNALS = frozenset((1, 2, 3, 15))
SIGNAL_MAX = 64

VM_SHELL = b"/vm_shell"
READY_DESCRIPTION = b"vsh ready"
EXITED_DESCRIPTION = b"target process has exited"

# FailureKind
OTHER, NOT_FOUND, NOT_EXECUTABLE, TOO_LONG, BAD_DIRECTORY, BAD_USER, LIMIT, BAD_REQUEST, SHUTDOWN, PROTOCOL = range(10)
NOT_TRUSTED, UNREACHABLE, FROZEN, NO_SESSION, BUSY, UNSUPPORTED = 10, 11, 12, 13, 14, 15

# Verbs of Lasting, and modes of Attach (7).
START, LIST, SIGNAL_IT, FORGET = 1, 2, 3, 4
BOTH, OUTPUT, FOLLOW, INPUT, WAIT = 1, 2, 3, 4, 5

# Our own fields start here: far from upstream's, and outside 19000-19999, which protobuf reserves.
VENDOR = 52001

# Members of GuestMessage and HostMessage.
DATA_MESSAGE = 1
STATUS_MESSAGE = 2
RESIZE_MESSAGE = 3
SIGNAL = 4
CREDIT = VENDOR
CLOSE_STREAM = VENDOR + 1
ALIVE = VENDOR + 2
HOLD = VENDOR + 3
SIGNAL_NUMBER = VENDOR + 4
REQUEST_CHUNK = VENDOR + 5
STARTED = VENDOR + 6
PROOF = VENDOR + 7
POSITION = VENDOR + 8


class Failure(Message):
    """Why nothing was run, or why a session ended: a kind for programs, errno and subject for people."""

    __slots__ = ("error", "kind", "subject")

    FIELDS = (Field(1, "kind", INT32), Field(2, "error", UINT32), Field(3, "subject", BYTES))

    def __init__(self, kind: int = OTHER, error: int = 0, subject: bytes = b"") -> None:
        self.kind = kind
        self.error = error
        self.subject = subject


class Extended(Message):
    """ExtendedOffer and ExtendedAnswer: what the sender of it speaks and accepts (2.1)."""

    __slots__ = ("failure", "features", "max_data", "nonce", "request_size", "silence_ms", "version", "window")

    FIELDS = (
        Field(1, "version", UINT32),
        Field(2, "features", UINT64),
        Field(3, "max_data", UINT32),
        Field(4, "window", UINT32),
        Field(5, "silence_ms", UINT32),
        Field(6, "request_size", UINT32),
        Field(7, "failure", MESSAGE, Failure),
        Field(8, "nonce", BYTES),
    )

    def __init__(
        self,
        *,
        version: int = 0,
        features: int = 0,
        max_data: int = 0,
        window: int = 0,
        silence_ms: int = 0,
        request_size: int = 0,
        failure: Failure | None = None,
        nonce: bytes = b"",
    ) -> None:
        self.version = version
        self.features = features
        self.max_data = max_data
        self.window = window
        self.silence_ms = silence_ms
        self.request_size = request_size
        self.failure = failure
        self.nonce = nonce


class SetupConnectionRequest(Message):
    """The client's first message: what to run, as whom, where, and how."""

    __slots__ = (
        "argv",
        "attach",
        "clock",
        "command",
        "cores",
        "cwd",
        "cwd_pid",
        "env",
        "extended",
        "forward",
        "freeze",
        "keeps_env",
        "lasting",
        "logs",
        "nopty",
        "ports",
        "power_off",
        "share",
        "subsystem",
        "target",
        "thaw",
        "units",
        "user",
        "window_cols",
        "window_rows",
        "window_xpixels",
        "window_ypixels",
    )

    FIELDS = (
        Field(1, "target", BYTES),
        Field(2, "user", BYTES),
        Field(3, "env", BYTES_MAP),
        Field(4, "command", BYTES),
        Field(5, "argv", BYTES_LIST),
        Field(6, "window_rows", INT32),
        Field(7, "window_cols", INT32),
        Field(8, "nopty", BOOL),
        Field(9, "cwd", BYTES),
        Field(10, "cwd_pid", INT32),
        Field(VENDOR, "extended", MESSAGE, Extended),
        Field(VENDOR + 1, "forward", MESSAGE, Forward),
        Field(VENDOR + 2, "freeze", MESSAGE, Freeze),
        Field(VENDOR + 3, "thaw", MESSAGE, Thaw),
        Field(VENDOR + 4, "clock", MESSAGE, Clock),
        Field(VENDOR + 5, "subsystem", MESSAGE, Subsystem),
        Field(VENDOR + 6, "lasting", MESSAGE, Lasting),
        Field(VENDOR + 7, "attach", MESSAGE, Attach),
        Field(VENDOR + 8, "window_xpixels", UINT32),
        Field(VENDOR + 9, "window_ypixels", UINT32),
        Field(VENDOR + 10, "power_off", MESSAGE, PowerOff),
        Field(VENDOR + 11, "keeps_env", BOOL),
        Field(VENDOR + 19, "ports", MESSAGE, Ports),
        Field(VENDOR + 29, "logs", MESSAGE, Logs),
        Field(VENDOR + 39, "cores", MESSAGE, Cores),
        Field(VENDOR + 40, "units", MESSAGE, Units),
        Field(VENDOR + 49, "share", MESSAGE, Share),
    )

    def __init__(
        self,
        *,
        target: bytes = b"",
        user: bytes = b"",
        env: dict[bytes, bytes] | None = None,
        argv: list[bytes] | None = None,
        window_rows: int = 0,
        window_cols: int = 0,
        nopty: bool = False,
        cwd: bytes = b"",
        cwd_pid: int = 0,
        extended: Extended | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.target = target
        self.user = user
        self.env = {} if env is None else env
        self.command = b""
        self.argv = [] if argv is None else argv
        self.window_rows = window_rows
        self.window_cols = window_cols
        self.window_xpixels = 0
        self.window_ypixels = 0
        self.nopty = nopty
        self.cwd = cwd
        self.cwd_pid = cwd_pid
        self.extended = extended
        self.forward = forward
        self.freeze: Freeze | None = None
        self.thaw: Thaw | None = None
        self.clock: Clock | None = None
        self.subsystem: Subsystem | None = None
        self.lasting: Lasting | None = None
        self.attach: Attach | None = None
        self.power_off: PowerOff | None = None
        self.logs: Logs | None = None
        self.ports: Ports | None = None
        self.share: Share | None = None
        self.cores: Cores | None = None
        self.units: Units | None = None
        # HOME and SHELL of `env` are the target's, too.
        self.keeps_env = False


class SetupConnectionResponse(Message):
    """The server's first message: READY with the target's pid, or FAILED."""

    __slots__ = ("description", "extended", "pid", "status")

    FIELDS = (
        Field(1, "status", INT32),
        Field(2, "description", BYTES),
        Field(3, "pid", INT32),
        Field(VENDOR, "extended", MESSAGE, Extended),
    )

    def __init__(
        self, status: int = UNKNOWN, description: bytes = b"", pid: int = 0, extended: Extended | None = None
    ) -> None:
        self.status = status
        self.description = description
        self.pid = pid
        self.extended = extended


class ConnectionStatusMessage(Message):
    """The end of a session: EXITED with a code or a signal, or FAILED."""

    __slots__ = ("code", "core_dumped", "description", "failure", "signal", "status")

    FIELDS = (
        Field(1, "status", INT32),
        Field(2, "description", BYTES),
        Field(3, "code", SINT32),
        Field(VENDOR, "signal", UINT32),
        Field(VENDOR + 1, "core_dumped", BOOL),
        Field(VENDOR + 2, "failure", MESSAGE, Failure),
    )

    def __init__(
        self,
        status: int = UNKNOWN,
        description: bytes = b"",
        code: int = 0,
        *,
        signal: int = 0,
        core_dumped: bool = False,
        failure: Failure | None = None,
    ) -> None:
        self.status = status
        self.description = description
        self.code = code
        self.signal = signal
        self.core_dumped = core_dumped
        self.failure = failure


class DataMessage(Message):
    """Bytes of one stream; none: its end."""

    __slots__ = ("data", "stream")

    FIELDS = (Field(1, "stream", INT32), Field(2, "data", BYTES))

    def __init__(self, stream: int = 0, data: bytes = b"") -> None:
        self.stream = stream
        self.data = data


class WindowResizeMessage(Message):
    """The client's terminal has this size now."""

    __slots__ = ("cols", "rows", "xpixels", "ypixels")

    FIELDS = (
        Field(1, "rows", INT32),
        Field(2, "cols", INT32),
        Field(VENDOR, "xpixels", UINT32),
        Field(VENDOR + 1, "ypixels", UINT32),
    )

    def __init__(self, rows: int = 0, cols: int = 0, xpixels: int = 0, ypixels: int = 0) -> None:
        self.rows = rows
        self.cols = cols
        self.xpixels = xpixels
        self.ypixels = ypixels


class CreditMessage(Message):
    """The sender consumed this much of a stream: so much more may be sent (2.4)."""

    __slots__ = ("bytes", "stream")

    FIELDS = (Field(1, "stream", INT32), Field(2, "bytes", UINT32))

    def __init__(self, stream: int = 0, bytes_: int = 0) -> None:
        self.stream = stream
        self.bytes = bytes_


class PositionMessage(Message):
    """The next byte of output has this offset; so many before it were dropped, and never sent (7.3). has_pty: the
    target has a terminal."""

    __slots__ = ("dropped", "has_pty", "offset")

    FIELDS = (Field(1, "offset", UINT64), Field(2, "dropped", UINT64), Field(3, "has_pty", BOOL))

    def __init__(self, offset: int = 0, dropped: int = 0, *, has_pty: bool = False) -> None:
        self.offset = offset
        self.dropped = dropped
        self.has_pty = has_pty


class HostMessage(Oneof):
    """Whatever the server says after its response; `member` is the field number that is set, 0 if none."""

    __slots__ = ()

    FIELDS = (
        Field(DATA_MESSAGE, "data_message", MESSAGE, DataMessage),
        Field(STATUS_MESSAGE, "status_message", MESSAGE, ConnectionStatusMessage),
        Field(CREDIT, "credit", MESSAGE, CreditMessage),
        Field(CLOSE_STREAM, "close_stream", INT32),
        Field(ALIVE, "alive", BOOL),
        Field(STARTED, "started", MESSAGE, SetupConnectionResponse),
        Field(PROOF, "proof", BYTES),
        Field(POSITION, "position", MESSAGE, PositionMessage),
    )


class GuestMessage(Oneof):
    """Whatever the client says after its request; `member` is the field number that is set, 0 if none."""

    __slots__ = ()

    FIELDS = (
        Field(DATA_MESSAGE, "data_message", MESSAGE, DataMessage),
        Field(STATUS_MESSAGE, "status_message", MESSAGE, ConnectionStatusMessage),
        Field(RESIZE_MESSAGE, "resize_message", MESSAGE, WindowResizeMessage),
        Field(SIGNAL, "signal", INT32),
        Field(CREDIT, "credit", MESSAGE, CreditMessage),
        Field(CLOSE_STREAM, "close_stream", INT32),
        Field(ALIVE, "alive", BOOL),
        Field(HOLD, "hold", BOOL),
        Field(SIGNAL_NUMBER, "signal_number", UINT32),
        Field(REQUEST_CHUNK, "request_chunk", BYTES),
        Field(PROOF, "proof", BYTES),
    )
