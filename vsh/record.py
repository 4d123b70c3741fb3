"""Records a session into a file: an asciicast for a terminal, and a line of JSON for each piece of data for pipes.

Sources: the asciicast formats, version 3 and version 2 (docs.asciinema.org). docs/reference/files.md has the log.
What is recorded is what this process's terminal or pipes took, when they took it. A file that cannot be written any
more ends the recording, not the session.
"""

import base64
import codecs
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from vsh.errors import UsageError, VshError
from vsh.flags import LASTING_KINDS, Options
from vsh.pump import Sink, Source
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.address import Address
    from vsh.registry import Entry
    from vsh.shell import Shell

LOG_VERSION = 1
FORMATS = ("asciicast-v3", "asciicast-v2", "log")
TERMINAL_VARIABLES = ("TERM", "SHELL")
STREAMS = {messages.STDOUT: "stdout", messages.STDERR: "stderr"}
STDIN = "stdin"
# Times in a file are in microseconds.
DIGITS = 6


class Cast:
    """Renders an asciicast. version 3 has times since the line before, 2 since the start."""

    def __init__(self, version: int, rows: int, cols: int, command: str, started_s: float) -> None:
        """started_s: since 1970, for the header."""
        self._version = version
        self._last_s = 0.0
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in "oi"}
        environment = {name: os.environ[name] for name in TERMINAL_VARIABLES if name in os.environ}
        header: dict[str, object] = {"version": version}
        if version == 3:
            header["term"] = {"cols": cols, "rows": rows, "type": environment.pop("TERM", "")}
        else:
            header |= {"width": cols, "height": rows}
        header |= {"timestamp": int(started_s), "command": command, "env": environment}
        self.header = _render(header)

    def render_data(self, stream: str, data: bytes, at_s: float) -> str:
        """Bytes that the terminal took, or that a person typed. A character that is cut waits for its rest."""
        code = "i" if stream == STDIN else "o"
        text = self._decoders[code].decode(data)
        return self._render(code, text, at_s) if text else ""

    def render_size(self, rows: int, cols: int, at_s: float) -> str:
        return self._render("r", f"{cols}x{rows}", at_s)

    def render_end(self, status: int, reason: str, at_s: float) -> str:
        """Only version 3 knows an end; version 2 has a marker."""
        if self._version == 3:
            return self._render("x", str(status), at_s)
        return self._render("m", reason or f"exit {status}", at_s)

    def _render(self, code: str, text: str, at_s: float) -> str:
        shown_s = at_s - self._last_s if self._version == 3 else at_s
        self._last_s = at_s
        return _render([round(max(0.0, shown_s), DIGITS), code, text])


class StreamLog:
    """Renders a log of streams: one JSON object a line."""

    def __init__(self, command: list[str], started_s: float) -> None:
        self.header = _render({"vsh_log": LOG_VERSION, "started": round(started_s, 3), "command": command})

    def render_data(self, stream: str, data: bytes, at_s: float) -> str:
        # Not by json as a whole: it would look at each letter of base64.
        head = f'{{"t":{round(at_s, DIGITS)},"stream":"{stream}",'
        # A NUL is in no text, and six characters in JSON.
        if b"\0" not in data:
            with suppress(UnicodeDecodeError):
                return f'{head}"text":{json.dumps(data.decode(), ensure_ascii=False)}}}\n'
        return f'{head}"base64":"{base64.b64encode(data).decode()}"}}\n'

    def render_size(self, _rows: int, _cols: int, _at_s: float) -> str:
        """Pipes have no size."""
        return ""

    def render_end(self, status: int, reason: str, at_s: float) -> str:
        return _render({"t": round(at_s, DIGITS), "exit": status, **({"reason": reason} if reason else {})})


class Recorder:
    """The file of a recording. Invariant: it holds whole lines, the header first."""

    def __init__(self, path: str, form: "Cast | StreamLog") -> None:
        """Makes the file for this user alone. Raises UsageError for one that exists, VshError."""
        self._path = path
        self._form = form
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise UsageError(f"--record writes no file that exists: {path}", hint="choose another name") from None
        except OSError as error:
            raise VshError(f"cannot record into {path}: {error.strerror}") from error
        self.trouble = ""
        # Of vsh, at the session's end.
        self.status = 1
        self._has_begun = False
        self._size = (0, 0)
        self._start_s = time.monotonic()

    def add(self, stream: str, data: bytes) -> None:
        """Data of a stream."""
        self._write(self._form.render_data(stream, data, self._passed_s()))

    def resize(self, rows: int, cols: int) -> None:
        """The terminal has this size now; a signal may come twice."""
        if (rows, cols) == self._size:
            return
        self._size = rows, cols
        self._write(self._form.render_size(rows, cols, self._passed_s()))

    def close(self, reason: str) -> None:
        """Records the end, and closes the file. It is removed where no session has begun. reason: of a lost session."""
        if self._has_begun:
            self._write(self._form.render_end(self.status, reason, self._passed_s()))
        os.close(self._fd)
        if not self._has_begun:
            try:
                os.unlink(self._path)
            except OSError:
                return

    def attach(self, shell: "Shell", *, has_input: bool) -> None:
        """Sees what the shell's sinks take, its terminal's sizes, and (has_input) what its source gives."""
        self._has_begun = True
        self._start_s = time.monotonic()
        self._write(self._form.header)
        for stream, outlet in shell.pump.outlets.items():
            outlet.sink = RecordedSink(outlet.sink, self, STREAMS[stream])
        shell.on_size.append(self.resize)
        if has_input and shell.pump.source is not None:
            shell.pump.source = RecordedSource(shell.pump.source, self)

    def _passed_s(self) -> float:
        return time.monotonic() - self._start_s

    def _write(self, line: str) -> None:
        if self.trouble:
            return
        # A word of the command may hold any bytes, and the file is UTF-8.
        data = line.encode("utf-8", "replace")
        before = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            self.trouble = f"the recording {self._path} ends early: {error.strerror}"
            with suppress(OSError):
                os.ftruncate(self._fd, before)


class RecordedSink(Sink):
    """A sink whose bytes are recorded as it takes them. They pass through this program: nothing is spliced."""

    def __init__(self, sink: Sink, recorder: Recorder, stream: str) -> None:
        self._sink = sink
        self._recorder = recorder
        self._stream = stream

    @property
    def fd(self) -> int:  # type: ignore[override]  # it changes with the sink's
        return self._sink.fd

    def write(self, pieces: "list[memoryview | bytes]") -> int:
        size = left = self._sink.write(pieces)
        taken = []
        for piece in pieces:
            if left <= 0:
                break
            taken.append(piece[:left])
            left -= len(piece)
        if taken:
            self._recorder.add(self._stream, b"".join(taken))
        return size

    def close(self) -> None:
        self._sink.close()


class RecordedSource(Source):
    """A source whose bytes are recorded as the session takes them."""

    def __init__(self, source: Source, recorder: Recorder) -> None:
        self._source = source
        self._recorder = recorder
        self.room_min = source.room_min

    @property
    def fd(self) -> int:  # type: ignore[override]  # it changes with the source's
        return self._source.fd

    @property
    def is_held(self) -> bool:
        return self._source.is_held

    @property
    def look_s(self) -> float | None:
        return self._source.look_s

    def read(self, limit: int) -> "bytes | memoryview | None":
        data = self._source.read(limit)
        if data:
            self._recorder.add(STDIN, bytes(data))
        return data

    def close(self) -> None:
        self._source.close()


@contextmanager
def open_recorder(path: str, form: "Cast | StreamLog") -> Iterator[Recorder]:
    """A recorder of one session, which the block runs. Raises UsageError, VshError."""
    recorder = Recorder(path, form)
    reason = ""
    try:
        yield recorder
    except VshError as error:
        recorder.status, reason = error.status, error.brief
        raise
    finally:
        recorder.close(reason)
        if recorder.trouble:
            print(f"vsh: {recorder.trouble}", file=sys.stderr)


@contextmanager
def open_recorders(
    options: Options, where: "Address", command: Sequence[str], size: tuple[int, int], *, has_pty: bool
) -> Iterator[list[Recorder]]:
    """The recorders of one session, which the block runs: for --record=FILE, and for the folder of the machine.

    size: rows and columns. A folder that takes no file is a warning: the session runs without. Raises UsageError,
    VshError.
    """
    with ExitStack() as stack:
        recorders = []
        if options.record:
            form = make_form(options.record_format, command, size, has_pty=has_pty)
            recorders.append(stack.enter_context(open_recorder(options.record, form)))
        if where.entry is not None and where.entry.recordings:
            form = make_form("", command, size, has_pty=has_pty)
            try:
                os.makedirs(where.entry.recordings, 0o700, exist_ok=True)
                path = plan_path(where.entry, time.time(), os.getpid(), has_pty=has_pty)
                recorders.append(stack.enter_context(open_recorder(path, form)))
            except (VshError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                print(f"vsh: this session is not recorded into {where.entry.recordings}: {reason}", file=sys.stderr)
        yield recorders


def plan_path(machine: "Entry", now_s: float, pid: int, *, has_pty: bool) -> str:
    """The file of a session in the machine's folder: by the machine, the start in UTC, and the process."""
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now_s))
    return os.path.join(machine.recordings, f"{machine.name}-{moment}-{pid}.{'cast' if has_pty else 'jsonl'}")


def check_options(options: Options) -> None:
    """What --record does not go together with. Raises UsageError."""
    if options.record_format and options.record_format not in FORMATS:
        raise UsageError(f"--record_format must be {', '.join(FORMATS)}, not '{options.record_format}'")
    if not options.record:
        raise UsageError("--record_format and --record_input need --record=FILE")
    if options.proxy or options.subsystem or options.forward_only:
        raise UsageError("--record is for sessions, not for --proxy, --subsystem or -N")
    lasting = options.given.intersection(LASTING_KINDS)
    if lasting and lasting.isdisjoint(("attach", "output")):
        raise UsageError(f"--record belongs to a command, to --attach and --output, not to --{min(lasting)}")


def make_form(name: str, command: Sequence[str], size: tuple[int, int], *, has_pty: bool) -> "Cast | StreamLog":
    """What the file has. name: of FORMATS; "": chosen by the session. size: rows and columns. Raises UsageError."""
    name = name or (FORMATS[0] if has_pty else "log")
    if name == "log":
        return StreamLog(list(command), time.time())
    if not has_pty:
        raise UsageError(f"{name} is for sessions with a terminal", hint="leave out --record_format, or add -t")
    return Cast(int(name[-1]), *size, " ".join(command), time.time())


def _render(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
