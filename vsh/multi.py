"""One command in several machines at once: a process of ours for each, and what they print, line by line, with the
machine's name in front.

Each process is a fork of this one and runs vsh as for one machine, so that errors, limits and statuses are the same.
The processes are not of the terminal's foreground group: this process passes its signals on, once.
"""

import copy
import os
import select
import time

from vsh import signals
from vsh.errors import UsageError
from vsh.flags import Options
from vsh.patience import write_patiently

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MACHINES_MAX = 256
READ_BYTES = 1 << 16
# A longer line is printed in parts.
LINE_BYTES_MAX = 1 << 16
# A command that ignores TERM ends with its client.
END_S = 5.0
STDOUT, STDERR = 1, 2
SIGNALLED = 128
PIPE_BROKEN = 128 + 13
ELSEWHERE = ("cid", "vm_name", "uds", "unix", "fd")
EXCLUDED = (*ELSEWHERE, "local", "remote", "dynamic", "forward_only", "proxy", "subsystem", "tty", "record")


class Participant:
    """The process of one machine. Invariant: `streams` are open, and `lines` are the beginnings of their lines."""

    def __init__(self, name: str, pid: int, streams: dict[int, int]) -> None:
        """streams: the descriptors that are read, and the stream of ours that each goes to."""
        self.name = name
        self.pid = pid
        self.streams = streams
        self.lines = dict.fromkeys(streams, b"")

    def close(self, fd: int) -> None:
        """Closes the descriptor of a stream."""
        os.close(fd)
        del self.streams[fd]

    def feed(self, fd: int, data: bytes) -> bytes:
        """What is printed for new data of a stream; no data: its end."""
        *whole, rest = (self.lines[fd] + data).split(b"\n")
        if rest and (not data or len(rest) > LINE_BYTES_MAX):
            whole.append(rest)
            rest = b""
        self.lines[fd] = rest
        prefix = os.fsencode(self.name) + b": "
        return b"".join(prefix + line + b"\n" for line in whole)


def parse_names(options: Options) -> list[str]:
    """The machines of --multi. Raises UsageError."""
    names = options.multi.split(",")
    if not all(names):
        raise UsageError(f"--multi needs names of machines with commas between them, not '{options.multi}'")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"--multi has '{min(twice)}' twice")
    if len(names) > MACHINES_MAX:
        raise UsageError(f"--multi takes at most {MACHINES_MAX} machines, not {len(names)}")
    if not options.command:
        raise UsageError("--multi needs a command", hint="vsh --multi=A,B -- COMMAND")
    for name in EXCLUDED:
        if name in options.given:
            raise UsageError(f"--multi excludes --{name}")
    return names


def run_multi(options: Options, run: "Callable[[Options], int]") -> int:
    """Runs the command in all machines at once, and returns the highest status. Raises UsageError, OSError.

    run: vsh for one machine; it prints its own errors.
    """
    names = parse_names(options)
    wakeup = signals.Wakeup((signals.SIGHUP, signals.SIGINT, signals.SIGQUIT, signals.SIGTERM))
    members: list[Participant] = []
    try:
        for name in names:
            # After a failure those that have started must be known.
            members.append(_start(name, _make_options(options, name), run, wakeup, members))
        _relay(members, wakeup)
    except BaseException as error:
        _end(members)
        if isinstance(error, BrokenPipeError):
            return PIPE_BROKEN
        raise
    return max(map(_wait, members))


def _make_options(options: Options, name: str) -> Options:
    own = copy.copy(options)
    own.multi = ""
    own.notty = own.stdin_null = True
    if name.isascii() and name.isdigit():
        own.cid = int(name)
    else:
        own.vm_name = name
    own.given = {*options.given, "cid" if own.cid is not None else "vm_name"}
    return own


def _start(
    name: str, options: Options, run: "Callable[[Options], int]", wakeup: signals.Wakeup, others: list[Participant]
) -> Participant:
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(out[1])
        os.close(err[1])
        return Participant(name, pid, {out[0]: STDOUT, err[0]: STDERR})
    status = 1
    try:
        # Its own group before all else: what the terminal sends to ours comes once, from us.
        os.setpgid(0, 0)
        wakeup.forget()
        os.dup2(out[1], STDOUT)
        os.dup2(err[1], STDERR)
        # Only the first process reads: when it is killed, the others find their pipes without a reader, and end.
        for fd in (*out, *err, *(fd for other in others for fd in other.streams)):
            os.close(fd)
        status = run(options)
    finally:
        os._exit(status)


def _relay(members: list[Participant], wakeup: signals.Wakeup) -> None:
    poll = select.poll()
    poll.register(wakeup.fd, select.POLLIN)
    open_fds = {fd: member for member in members for fd in member.streams}
    for fd in open_fds:
        poll.register(fd, select.POLLIN)
    while open_fds:
        for fd, _ in poll.poll():
            if fd == wakeup.fd:
                for number in wakeup.take():
                    for member in members:
                        _pass_on(member, number)
                continue
            member = open_fds[fd]
            data = os.read(fd, READ_BYTES)
            write_patiently(member.streams[fd], member.feed(fd, data))
            if not data:
                poll.unregister(fd)
                member.close(fd)
                del open_fds[fd]


def _end(members: list[Participant]) -> None:
    """Ends all processes: by TERM, and those that still run after END_S by KILL."""
    poll = select.poll()
    for member in members:
        _pass_on(member, signals.SIGTERM)
        for fd in member.streams:
            # Not to read: the end of the process closes the other end.
            poll.register(fd, 0)
    left = {fd for member in members for fd in member.streams}
    deadline_s = time.monotonic() + END_S
    while left and time.monotonic() < deadline_s:
        for fd, _ in poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            poll.unregister(fd)
            left.discard(fd)
    for member in members:
        if not left.isdisjoint(member.streams):
            _pass_on(member, signals.SIGKILL)
        _wait(member)


def _pass_on(member: Participant, number: int) -> None:
    try:
        os.kill(member.pid, number)
    except ProcessLookupError:
        pass


def _wait(member: Participant) -> int:
    """The status of a machine's process, as a shell shows it."""
    _, status = os.waitpid(member.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else SIGNALLED - code
