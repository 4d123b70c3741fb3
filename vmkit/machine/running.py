"""A running machine, found by name or CID, and all that Python can do with it. Any process may have started it.

Owns no process. Each call looks the machine up again, so that a later machine of the same name is never taken for it.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, TextIO, Unpack, overload

from vmkit.errors import ConfigError, MachineError
from vmkit.machine import stop
from vmkit.machine.launch import Layout
from vmkit.machine.parts.table import list_companion_logs
from vmkit.machine.pause import ClockOffset, Resumed, measure_clock, pause, resume
from vmkit.machine.registry import find_state_directory, read_stored_names, sweep
from vmkit.machine.services import ServicedMachine
from vmkit.machine.sessions import SessionFollower, render_sessions
from vmkit.machine.spec import DEFAULT_TIMEOUT_S, check_name
from vmkit.machine.words import Ended, TakeKernelLog
from vmkit.memory.lines import KernelLine, parse_lines
from vsh.address import address_of
from vsh.client import Argv, Client, OpenOptions, PopenOptions, Result, RunOptions
from vsh.ending import Ending, await_ending, describe_last, read_ending
from vsh.process import Process
from vsh.registry import Entry, is_for_users
from vsh.registry import find_machine as find_entry
from vsh.registry import read_machines as read_entries

if TYPE_CHECKING:
    from vmkit.machine.booted import BootState

# A log grows by the monitor's writes; no descriptor announces them.
FOLLOW_POLL_S = 0.2
# Each look at the guest's memory costs some 10 ms.
SESSIONS_POLL_S = 1.0
READ_BYTES = 65536
CONSOLE_CONNECT_TIMEOUT_S = 5.0
# A guest that has touched tens of GiB takes seconds to search.
KERNEL_LOG_DEADLINE_S = 60.0
MAX_CID_DIGITS = 10

# What programs and the kernel of the guest write: see vmkit.machine.syslog.
SYSLOG = "syslog"
# The logs of a machine by the names that `vmkit logs --kind` takes.
LOG_KINDS = {
    "console": Layout.CONSOLE_LOG,
    "events": Layout.EVENTS,
    "qmp": Layout.QMP_LOG,
    "qemu": Layout.QEMU_LOG,
    "monitor": Layout.MONITOR_LOG,
    "argv": Layout.ARGV,
    "kernel": Layout.KERNEL_LOG,
    SYSLOG: Layout.SYSLOG,
    **list_companion_logs(),
}
# The kind that is no file: it comes out of the kernel's log.
SESSIONS = "sessions"


class MachineHandle(ServicedMachine):
    """What a started and a found machine have in common. Subclasses know which entry of the registry is theirs."""

    @property
    def state(self) -> str:
        """`starting`, `ready`, `paused` or `stopping`. Raises MachineError once it has ended."""
        return self.find_entry().state

    def connect(self) -> Client:
        """A client for sessions of your own; each session has a connection of its own."""
        entry = self.find_entry()
        if entry.state == "stopping":
            ending = await_ending(entry)
            if ending is not None:
                raise explain_ending(entry.name, ending)
        return Client(address_of(entry))

    @overload
    def run(self, argv: Argv, *, text: Literal[True], **options: Unpack[RunOptions]) -> Result[str]: ...

    @overload
    def run(self, argv: Argv, *, text: Literal[False] = False, **options: Unpack[RunOptions]) -> Result[bytes]: ...

    def run(self, argv: Argv, *, text: bool = False, **options: Unpack[RunOptions]) -> Result[bytes] | Result[str]:
        """Runs a command in the guest and returns its output and its end; the options are those of Client.run.

        Raises ExecError, ConnectionLost, TimedOut, CommandFailed, UsageError, MachineError.
        """
        return self.connect().run(argv, text=text, **options)

    @overload
    def popen(self, argv: Argv, *, text: Literal[True], **options: Unpack[PopenOptions]) -> Process[str]: ...

    @overload
    def popen(self, argv: Argv, *, text: Literal[False] = False, **options: Unpack[PopenOptions]) -> Process[bytes]: ...

    def popen(
        self, argv: Argv, *, text: bool = False, **options: Unpack[PopenOptions]
    ) -> Process[bytes] | Process[str]:
        """Starts a command in the guest and returns at once; the options are those of Client.popen.

        Raises ExecError, ConnectionLost, UsageError, MachineError.
        """
        return self.connect().popen(argv, text=text, **options)

    def push(self, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str = "") -> None:
        """Copies a file or a directory of the host to the guest's path `destination`, whose directory must exist.

        `destination` is the path of the copy itself. Each file appears whole; a directory that is there is added to.
        A link that you name is followed. It is `vmkit cp`, and keeps what that keeps. Raises VshError kinds.
        """
        from vmkit.machine import files  # noqa: PLC0415  (most programs copy nothing)

        files.push(self.find_entry(), source, destination, user=user)

    def pull(self, source: str | os.PathLike[str], destination: str | os.PathLike[str], *, user: str = "") -> None:
        """Copies a file or a directory of the guest to the host's path `destination`, where the copy appears whole.

        `destination` is the path of the copy itself, and no directory. A link that you name is followed. It is `vmkit
        cp`, and keeps what that keeps. Raises VshError kinds; then an old destination is unchanged.
        """
        from vmkit.machine import files  # noqa: PLC0415  (most programs copy nothing)

        files.pull(self.find_entry(), source, destination, user=user)

    @overload
    def open(self, path: str | bytes, mode: str = "r", *, encoding: str, **options: Unpack[OpenOptions]) -> TextIO: ...

    @overload
    def open(
        self, path: str | bytes, mode: str = "r", *, encoding: None = None, **options: Unpack[OpenOptions]
    ) -> BinaryIO: ...

    def open(
        self, path: str | bytes, mode: str = "r", *, encoding: str | None = None, **options: Unpack[OpenOptions]
    ) -> BinaryIO | TextIO:
        """Opens a file of the guest as a file object; the options are those of Client.open.

        Raises OSError for the file, VshError kinds for the connection.
        """
        return self.connect().open(path, mode, encoding=encoding, **options)

    def exists(self, path: str, *, user: str = "") -> bool:
        """Whether the guest has something at this path; see Client.exists."""
        return self.connect().exists(path, user=user)

    def wait(self, timeout: float | None = None) -> Ended | None:
        """Blocks until the machine ends, timeout seconds at most; returns why it ended, None when time was over."""
        return stop.wait_for_end(self.find_entry(), timeout)

    def wait_booted(self, timeout: float = DEFAULT_TIMEOUT_S) -> "BootState":
        """Waits until the systemd of the guest has finished its boot, timeout seconds at most.

        A guest without systemd has booted once it is ready. Raises MachineError, when the time is over, too.
        """
        from vmkit.machine.booted import wait_booted  # noqa: PLC0415 - most guests have no systemd

        return wait_booted(self.find_entry(), timeout)

    def read_log(self, kind: str = "console") -> bytes:
        """A log as it is now; kind: a key of LOG_KINDS, or "sessions". Raises ConfigError, MachineError."""
        if kind == SESSIONS:
            return render_sessions(take_kernel_log(self.find_entry()))
        if kind == SYSLOG:
            return logs(self.find_entry().name, kind)
        return b"".join(read_log(Path(self.find_entry().directory), kind))

    def follow_log(self, kind: str = "console") -> Iterator[bytes]:
        """A log as it is now, and then what is added, until the machine ends. Raises ConfigError, MachineError."""
        if kind == SESSIONS:
            return follow_sessions(self.find_entry().name)
        return follow_log(Path(self.find_entry().directory), kind)

    def dmesg(self) -> list[KernelLine]:
        """The kernel's log, read from the guest's memory without its help: it may run, or hang. Raises MachineError."""
        return list(parse_lines(take_kernel_log(self.find_entry())))

    def pause(self) -> None:
        """Stops the guest's processors; sessions and forwards wait. Raises MachineError."""
        pause(self.find_entry())

    def resume(self) -> Resumed:
        """Lets a paused guest run, with the right time. Raises MachineError."""
        return resume(self.find_entry())

    def measure_clock(self) -> ClockOffset:
        """How far the guest's clock is ahead of the host's. Raises MachineError."""
        return measure_clock(self.find_entry())

    def open_console(self) -> socket.socket:
        """A connection to the guest's serial console: it receives what the guest prints, and sends what is typed.

        The caller closes it. Raises MachineError when the console does not answer.
        """
        entry = self.find_entry()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONSOLE_CONNECT_TIMEOUT_S)
            sock.connect(str(Path(entry.directory) / Layout.CONSOLE_SOCKET))
            sock.settimeout(None)
        except OSError as error:
            sock.close()
            raise MachineError(f"the console of '{entry.name}' does not answer: {error.strerror or error}") from error
        return sock


class RunningMachine(MachineHandle):
    """A machine that was found running. It goes on when this object is gone."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self.name = entry.name
        self.cid = entry.cid
        self.directory = Path(entry.directory)

    def __repr__(self) -> str:
        return f"<RunningMachine name={self.name!r} cid={self.cid}>"

    @property
    def record(self) -> dict[str, object]:
        """Everything that is known of the machine: what `vmkit status --json` prints."""
        return {**self.find_entry().record, "directory": str(self.directory)}

    def find_entry(self) -> Entry:
        entry = find_entry(name=self.name)
        if entry is None or (self._entry.pid and entry.pid != self._entry.pid):
            raise explain_ending(self.name, read_ending(self.name, self._entry.pid))
        return entry

    def down(self, timeout: float | None = None) -> None:
        """Asks the guest to power off, then ends QEMU; waits until the machine is gone.

        timeout: how long the guest has; None is 20 seconds, or 90 where systemd is pid 1.
        """
        stop.power_off(self.find_entry(), timeout_s=timeout)

    def kill(self) -> None:
        """Ends the machine at once."""
        stop.kill(self.find_entry())


def explain_ending(name: str, ending: Ending | None) -> MachineError:
    """The failure of a call for a machine that has ended. ending: how, where that is known."""
    hint = f"see why: vmkit logs {name}"
    if ending is None:
        return MachineError(f"'{name}' is not running any more", hint=hint)
    if ending.is_expected:
        hint = ""
    return MachineError(f"'{name}' is not running any more: {ending.brief}", details=ending.details, hint=hint)


def list_machines() -> list[RunningMachine]:
    """The running machines of this user, in the order of their CIDs."""
    sweep()
    return [RunningMachine(entry) for entry in read_entries()]


def find_machine(name: str | int | None = None) -> RunningMachine:
    """The running machine of that name or CID; None: the only one. Raises MachineError, ConfigError."""
    return RunningMachine(pick_entry(None if name is None else str(name)))


def wait(name: str | int, timeout: float | None = None) -> Ended | None:
    """Blocks until a machine ends, timeout seconds at most; returns why it ended, None when time was over."""
    return find_machine(name).wait(timeout)


def logs(name: str, kind: str = "console") -> bytes:
    """A log of a running machine, or of the last one of that name that ended badly.

    Raises MachineError, ConfigError.
    """
    if kind == SESSIONS:
        return render_sessions(read_kernel_log(name))
    if kind == SYSLOG:
        from vmkit.machine.syslog import read_lines  # noqa: PLC0415  (it reads logs as this module does)

        return read_lines(name)
    return b"".join(read_log(find_logs(name), kind))


def dmesg(name: str | int | None = None) -> list[KernelLine]:
    """The kernel's log of a running machine, from its memory, or of the last one of that name that ended badly.

    None: of the only running machine. Raises MachineError, ConfigError.
    """
    return list(parse_lines(read_kernel_log(None if name is None else str(name))))


def pick_entry(name: str | None) -> Entry:
    """The entry of that name or CID, or the only one there is. Raises MachineError, ConfigError."""
    entries = read_entries()
    if name is None:
        # Any other is meant only when it is named, or when no machine of the user runs.
        entries = [entry for entry in entries if is_for_users(entry)] or entries
        if len(entries) == 1:
            return entries[0]
        if not entries:
            raise MachineError("no machine is running", hint="start one: vmkit up")
        raise ConfigError("several machines are running: name one", hint=", ".join(entry.name for entry in entries))
    found = find_named(name)
    if found is None:
        known = ", ".join(entry.name for entry in entries)
        hint = f"running: {known}" if known else "start one: vmkit up"
        if name in read_stored_names():
            hint = f"it stays, and is down; start it: vmkit up {name}"
        raise MachineError(f"no machine named '{name}' is running", details=describe_last(name), hint=hint)
    return found


def find_named(word: str) -> Entry | None:
    """The entry of that name, else of that CID."""
    found = find_entry(name=word)
    if found is None and word.isdecimal() and len(word) <= MAX_CID_DIGITS:
        found = find_entry(cid=int(word))
    return found


def find_logs(name: str | None) -> Path:
    """The folder with the logs of a running machine, else of the last one of that name that ended badly.

    None: of the only running machine. Raises MachineError, ConfigError.
    """
    running = pick_entry(None) if name is None else find_named(check_name(name))
    if running is not None:
        return Path(running.directory)
    assert name is not None
    kept = find_state_directory() / name
    if not kept.is_dir():
        raise MachineError(
            f"there are no logs of '{name}'",
            hint="vmkit keeps the logs of running machines, and of machines that ended badly",
        )
    return kept


def read_kernel_log(name: str | None) -> bytes:
    """The kernel's log of a running machine as it is now, or the kept one, as lines. Raises MachineError, ConfigError.

    vmkit.memory.lines describes the lines.
    """
    running = pick_entry(None) if name is None else find_named(check_name(name))
    if running is not None:
        return take_kernel_log(running)
    return b"".join(read_log(find_logs(name), "kernel"))


def take_kernel_log(entry: Entry) -> bytes:
    """Lets a machine's monitor read the kernel's log in the guest's memory. Raises MachineError."""
    with stop.open_control(entry) as control:
        answer = control.ask(TakeKernelLog(), KERNEL_LOG_DEADLINE_S)
    if not answer.ok:
        raise MachineError(f"cannot read the kernel's log of '{entry.name}': {answer.error}", hint=answer.hint)
    return b"".join(read_log(Path(entry.directory), "kernel"))


def follow_sessions(name: str | None) -> Iterator[bytes]:
    """The sessions of a machine, a JSON object a line, and each new one until the machine ends.

    Raises MachineError, ConfigError.
    """
    follower = SessionFollower()
    running = pick_entry(None) if name is None else find_named(check_name(name))
    if running is None:
        yield from follower.take(read_kernel_log(name))
        return
    while running is not None:
        try:
            yield from follower.take(take_kernel_log(running))
        except MachineError:
            if _is_running(Path(running.directory)):
                raise
            name, running = running.name, None
            break
        time.sleep(SESSIONS_POLL_S)
    assert name is not None
    # What it kept if it ended badly.
    with contextlib.suppress(MachineError):
        yield from follower.take(b"".join(read_log(find_logs(name), "kernel")))


def read_log(folder: Path, kind: str) -> Iterator[bytes]:
    """A log in a machine's folder, in pieces. Raises ConfigError, MachineError."""
    with _open_log(folder, kind) as fd:
        yield from _read_rest(fd)


def follow_log(folder: Path, kind: str) -> Iterator[bytes]:
    """A log in a machine's folder, and what is added until the machine ends; one that rolls over is opened anew."""
    with _open_log(folder, kind) as fd:
        yield from _read_rest(fd)
        while _is_running(folder):
            time.sleep(FOLLOW_POLL_S)
            yield from _read_rest(fd)
            with contextlib.suppress(FileNotFoundError):
                yield from _reopen(fd, folder / LOG_KINDS[kind])
        yield from _read_rest(fd)


@contextlib.contextmanager
def _open_log(folder: Path, kind: str) -> Iterator[int]:
    if kind not in LOG_KINDS:
        known = ", ".join(sorted((*LOG_KINDS, SESSIONS)))
        raise ConfigError(f"there is no kind of log '{kind}'", hint=f"kinds: {known}")
    try:
        fd = os.open(folder / LOG_KINDS[kind], os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        hint = f"see why: vmkit logs {folder.name} --kind events" if kind == "kernel" else ""
        raise MachineError(f"there is no {kind} log in {folder}", hint=hint) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _read_rest(fd: int) -> Iterator[bytes]:
    while data := os.read(fd, READ_BYTES):
        yield data


def _reopen(fd: int, path: Path) -> Iterator[bytes]:
    """Lets fd be the file that has the name now, when the old one has been read to its end."""
    new = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not os.path.sameopenfile(fd, new):
            yield from _read_rest(fd)
            os.dup2(new, fd, inheritable=False)
            yield from _read_rest(fd)
    finally:
        os.close(new)


def _is_running(folder: Path) -> bool:
    entry = find_entry(name=folder.name)
    return entry is not None and Path(entry.directory) == folder
