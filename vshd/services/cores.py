"""Sends the core dumps of this guest's programs to the host while they are made (docs/reference/protocol.md 5.7).

The kernel runs a program for each core (core(5), "Piping core dumps to a program"). Ours is a shell's few words: it
tells this process its number, and sleeps. This process opens the kernel's pipe through /proc and ends the shell. So a
crash starts no interpreter, and no disk of the guest has the core.

The kernel looks for that program in its own root, which is that of vshd: of pid 1's initramfs, or of the disk that
replaced it. Only root can enter the folder of the pipe: no other user of the guest can send a core, or a false one.
"""

import errno
import fcntl
import os
import select
import stat
import time

from vshd.session.refusal import RefusalError
from vshd.signals import SIGINT, SIGKILL, SIGTERM
from vshd.wire import cores, messages
from vshd.wire.cores import CoreFacts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Cores

FOLDER = "/run/vshd.cores"
PATTERN_FILE = "/proc/sys/kernel/core_pattern"
LIMIT_FILE = "/proc/sys/kernel/core_pipe_limit"
PATTERN_MAX = 200
# What the kernel has when no program of the guest asked for cores, and what systemd writes at its start.
FREE_PATTERNS = (b"core", b"core.%p", b"", b"|/bin/false")
SHELLS = ("/bin/busybox sh", "/bin/sh")
# The kernel's numbers, none of which a user chooses: no text of a user's gets into the shell.
WORDS = "%P %u %g %s %t"
WORD_COUNT = 6
DIGITS_MAX = 19
CALL_MAX = 200
# Open both ways, the FIFO needs no reader. The shell becomes `sleep`, which holds the core's pipe until we have it, and
# the FIFO, by which it is known. Where no vshd lives any more, the program that crashed waits so long.
HELPER_FD = 3
HELPER = b"""PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec 3<> "${0%/*}/calls" && echo "$$ $*" >&3 && exec sleep 10
"""
# So many programs can dump at once. The kernel keeps each until its core is sent, and leaves out the cores of others.
AT_ONCE = 8
PIPE_SIZE = 1 << 20
# One turn of reading and sending. Most cores have long runs of zeros, such as of memory that was never touched.
READ_SIZE = 1 << 16
ZEROS = bytes(READ_SIZE)
# Of a core with its zeros: so much more than of its data.
SPAN_TIMES = 4
# A guest that crashes again and again sends no more than these: of root, and of all other users together. One of those
# has half of what they have, so that it cannot use up another's.
BURST, USER_BURST, BURST_S = 10, 5, 60.0
ROOT = 0
# The host may be stopped for a while.
SEND_S = 60.0
# A core whose pages come from a program of the guest's (userfaultfd, FUSE) may never end. So long it may pause in all.
PAUSES_S = 30.0
# Whether another program has asked for the cores since.
LOOK_MS = 5000


class CoresEndedError(Exception):
    """The service ends, for a reason in words."""


def user_of(_cores: "Cores") -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_cores: "Cores") -> str:
    """What the log calls it."""
    return "core dumps"


def open_service(asked: "Cores", _fd: int, _around: "Surroundings") -> "CoreService":
    """Raises RefusalError where the guest has another program for its cores."""
    service = CoreService(asked.size)
    service.open()
    return service


class CoreService:
    """Invariant: from open() on the kernel's pattern is ours, until close() or another program's change of it.

    `_waiting` has the pipes of cores that are not sent yet, each with the kernel's numbers.
    """

    description = b""

    def __init__(
        self, size_max: int, folder: str = FOLDER, pattern_file: str = PATTERN_FILE, limit_file: str = LIMIT_FILE
    ) -> None:
        """size_max: of a core, without its zeros."""
        self._size_max = size_max
        self._folder = folder
        self._pattern_file = pattern_file
        self._limit_file = limit_file
        self._old = b"core"
        self._pattern = b""
        self._calls = -1
        self._waiting: list[tuple[int, list[int]]] = []
        # When the cores of the last while began, and whose they are.
        self._starts: list[tuple[float, int]] = []
        self._lost = 0

    def open(self) -> None:
        """Asks the kernel for the cores. Raises RefusalError."""
        try:
            pattern = self._render_pattern()
            old = _read_file(self._pattern_file, PATTERN_MAX).strip()
            # Ours is one that a vshd which was killed has left.
            if old != pattern:
                self._check_free(old)
                self._old = old
            self._make_folder()
            _write_file(self._limit_file, b"%d" % AT_ONCE)
            _write_file(self._pattern_file, pattern)
            self._pattern = pattern
        except OSError as error:
            self.close()
            raise RefusalError(
                f"cannot take the cores: {error.strerror}", messages.OTHER, error=error.errno or 0
            ) from error
        except RefusalError:
            self.close()
            raise

    def close(self) -> None:
        """The kernel's pattern is the old one again, and programs that wait are let go."""
        try:
            if self._pattern and _read_file(self._pattern_file, PATTERN_MAX).strip() == self._pattern:
                _write_file(self._pattern_file, self._old)
        except OSError:
            pass
        for pipe, _ in self._waiting:
            os.close(pipe)
        self._waiting = []
        if self._calls >= 0:
            os.close(self._calls)
        self._calls = -1

    def run(self, fd: int, _rest: bytes, wakeup: "Wakeup", log: "Log") -> str:
        """Serves until the host closes the connection."""
        os.set_blocking(fd, False)
        poll = self._watch(fd, wakeup)
        try:
            while True:
                if not self._turn(poll, LOOK_MS, fd, wakeup):
                    self._look()
                while self._waiting:
                    self._answer(fd, wakeup, log)
        except CoresEndedError as error:
            return f"ended: {error}"
        except RefusalError as error:
            return f"ended: {error.description}"
        except OSError as error:
            return f"ended: {error.strerror}"
        finally:
            self.close()
            os.close(fd)

    def _make_folder(self) -> None:
        """Raises OSError."""
        try:
            os.mkdir(self._folder, 0o700)
        except FileExistsError:
            os.chmod(self._folder, 0o700)
        path = f"{self._folder}/calls"
        try:
            # It may be there, with the calls that a vshd which was killed has not read.
            os.mkfifo(path, 0o600)
        except FileExistsError:
            pass
        self._calls = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        _write_file(f"{self._folder}/helper", HELPER, os.O_CREAT)

    def _render_pattern(self) -> bytes:
        for shell in SHELLS:
            if os.access(shell.split(" ", 1)[0], os.X_OK):
                return f"|{shell} {self._folder}/helper {WORDS}".encode()
        raise OSError(errno.ENOENT, "the guest has no shell")

    def _check_free(self, pattern: bytes) -> None:
        """Raises RefusalError where a program of the guest gets its cores."""
        words = pattern[1:].split()
        # One that the kernel cannot find is of a root of the user's, which the kernel does not know.
        is_dead = pattern.startswith(b"|") and not (words and os.access(words[0], os.X_OK))
        if pattern not in FREE_PATTERNS and not is_dead:
            shown = pattern.decode("ascii", "replace")
            raise RefusalError(f"the guest's cores go elsewhere: {shown}", messages.BUSY)

    def _look(self) -> None:
        """Has the kernel's pattern be ours again where what came instead is of no use. Raises RefusalError, OSError."""
        pattern = _read_file(self._pattern_file, PATTERN_MAX).strip()
        if pattern != self._pattern:
            self._check_free(pattern)
            self._old = pattern
            _write_file(self._pattern_file, self._pattern)

    def _watch(self, *fds: "int | Wakeup") -> select.poll:
        poll = select.poll()
        for fd in (self._calls, *fds):
            poll.register(fd if isinstance(fd, int) else fd.fd, select.POLLIN)
        return poll

    def _turn(self, poll: select.poll, wait_ms: float, fd: int, wakeup: "Wakeup") -> bool:
        """Waits, and takes the calls that came; whether anything did. Raises CoresEndedError, OSError."""
        ready = [found for found, _ in poll.poll(wait_ms)]
        _obey(wakeup)
        if fd in ready:
            # The host sends nothing, so this is its end.
            raise CoresEndedError("the host has left")
        if self._calls in ready:
            self._take_calls()
        return bool(ready)

    def _send(self, fd: int, data: bytes, wakeup: "Wakeup") -> None:
        """Raises CoresEndedError when the host does not read, or has left."""
        view = memoryview(data)
        deadline_s = time.monotonic() + SEND_S
        poll = self._watch(wakeup)
        poll.register(fd, select.POLLOUT)
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise CoresEndedError(f"the host took nothing for {SEND_S:g} s") from None
                ready = [found for found, _ in poll.poll(left_s * 1000)]
                _obey(wakeup)
                if self._calls in ready:
                    self._take_calls()
            except OSError as error:
                raise CoresEndedError(error.strerror or "the connection broke") from error

    def _take_calls(self) -> None:
        for line in os.read(self._calls, CALL_MAX * AT_ONCE).splitlines():
            self._take_call(line)

    def _take_call(self, line: bytes) -> None:
        """Opens the pipe of a core, also while another is sent: the helper need not wait."""
        numbers = parse_call(line)
        if numbers is None or len(self._waiting) >= AT_ONCE:
            return
        pipe = _open_pipe(numbers[0], self._calls)
        if pipe is not None:
            self._waiting.append((pipe, numbers[1:]))

    def _answer(self, fd: int, wakeup: "Wakeup", log: "Log") -> None:
        """Sends the next core. Raises CoresEndedError where the connection is of no more use, OSError."""
        pipe, numbers = self._waiting.pop(0)
        try:
            if not self._admit(numbers[1]):
                self._lost += 1
                return
            if self._lost:
                self._send(fd, cores.encode(cores.LOST, self._lost.to_bytes(4, "little")), wakeup)
                self._lost = 0
            facts = read_facts(numbers)
            self._send(fd, cores.encode(cores.BEGIN, facts.encode()), wakeup)
            end, size = self._send_core(pipe, fd, wakeup)
            self._send(fd, cores.encode(cores.END, bytes((end,))), wakeup)
            log.info(f"core dump of process {facts.pid}, signal {facts.signal}: {size} bytes")
        finally:
            # The kernel lets the program go.
            os.close(pipe)

    def _admit(self, uid: int) -> bool:
        now_s = time.monotonic()
        self._starts = [(start_s, whose) for start_s, whose in self._starts if now_s - start_s < BURST_S]
        users = [whose for _, whose in self._starts]
        own = users.count(uid)
        alike = own if uid == ROOT else len(users) - users.count(ROOT)
        if alike >= BURST or (uid != ROOT and own >= USER_BURST):
            return False
        self._starts.append((now_s, uid))
        return True

    def _send_core(self, pipe: int, fd: int, wakeup: "Wakeup") -> tuple[int, int]:
        """How the core ended, and its size up to there. Raises CoresEndedError, OSError."""
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        except (OSError, AttributeError):
            # Then it goes in smaller pieces.
            pass
        poll = self._watch(pipe, fd, wakeup)
        span = size = hole = 0
        left_s = PAUSES_S
        while True:
            try:
                data = os.read(pipe, READ_SIZE)
            except BlockingIOError:
                start_s = time.monotonic()
                self._turn(poll, left_s * 1000, fd, wakeup)
                left_s -= time.monotonic() - start_s
                if left_s <= 0:
                    return cores.BROKEN, span
                continue
            if not data:
                if hole:
                    self._send(fd, cores.encode_hole(hole), wakeup)
                return cores.WHOLE, span
            span += len(data)
            if span > SPAN_TIMES * self._size_max:
                return cores.CUT, span
            if data == ZEROS[: len(data)]:
                hole += len(data)
                continue
            size += len(data)
            if size > self._size_max:
                return cores.CUT, span
            head = cores.encode_hole(hole) if hole else b""
            hole = 0
            self._send(fd, head + cores.encode(cores.DATA, data), wakeup)


def parse_call(line: bytes) -> list[int] | None:
    """The helper's pid and the kernel's numbers; None for anything else."""
    words = line.split()
    if len(words) != WORD_COUNT or not all(word.isdigit() and len(word) <= DIGITS_MAX for word in words):
        return None
    return [int(word) for word in words]


def read_facts(numbers: list[int]) -> CoreFacts:
    """What is known of the process, which the kernel keeps until its core is taken. Empty is what cannot be read."""
    pid, uid, gid, signal, time_s = numbers
    facts = CoreFacts()
    facts.pid, facts.uid, facts.gid, facts.signal, facts.time_s = pid, uid, gid, signal, time_s
    folder = f"/proc/{pid}"
    facts.name = _try_file(f"{folder}/comm", 64).rstrip(b"\n")
    facts.command = _try_file(f"{folder}/cmdline", cores.COMMAND_MAX)
    facts.maps = _try_file(f"{folder}/maps", cores.MAPS_MAX)
    facts.cgroup = _try_file(f"{folder}/cgroup", cores.PATH_MAX).rstrip(b"\n")
    facts.exe = _try_link(f"{folder}/exe")[: cores.PATH_MAX]
    ours, its = _try_link("/proc/self/ns/pid"), _try_link(f"{folder}/ns/pid")
    facts.is_contained = bool(its) and its != ours
    return facts


def _open_pipe(helper: int, calls: int) -> int | None:
    """The pipe that the kernel writes a core to; None where the helper was killed, and there is no core any more."""
    folder = f"/proc/{helper}"
    pipe = -1
    try:
        pipe = os.open(f"{folder}/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        # Another process that has the helper's number by now, such as one of root's with a pipe, has no core for us.
        is_helper = os.path.samestat(os.stat(f"{folder}/fd/{HELPER_FD}"), os.fstat(calls))
        if is_helper and stat.S_ISFIFO(os.fstat(pipe).st_mode):
            # It has done its part. From here on the kernel writes to this process alone.
            os.kill(helper, SIGKILL)
            return pipe
    except OSError:
        pass
    if pipe >= 0:
        os.close(pipe)
    return None


def _obey(wakeup: "Wakeup") -> None:
    numbers = wakeup.take()
    if SIGTERM in numbers or SIGINT in numbers:
        raise CoresEndedError("by a signal")


def _read_file(path: str, size: int) -> bytes:
    """Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = b""
        # /proc gives a page at a time.
        while len(pieces) < size:
            piece = os.read(fd, size - len(pieces))
            if not piece:
                break
            pieces += piece
        return pieces
    finally:
        os.close(fd)


def _write_file(path: str, data: bytes, flags: int = 0) -> None:
    """Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC | flags, 0o700)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _try_file(path: str, size: int) -> bytes:
    try:
        return _read_file(path, size)
    except OSError:
        return b""


def _try_link(path: str) -> bytes:
    try:
        return os.fsencode(os.readlink(path))
    except OSError:
        return b""
