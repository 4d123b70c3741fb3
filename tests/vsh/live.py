"""A real vshd on a UNIX socket, and real vsh processes that speak to it: the whole path but the vsock.

In a guest that says it is made for it (tests/guest/test_vsock_sessions.py) the same tests run over the vsock as well.
"""

import contextlib
import fcntl
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol, TypedDict, TypeVar, Unpack

CHECKOUT = Path(__file__).resolve().parents[2]
DEADLINE_S = 30.0
# Where this file is, AF_VSOCK leads to the guest itself and to machines of the tests, and to nobody else.
IS_VSOCK_GUEST = Path("/etc/vsh-test-guest").exists()
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9  # linux/vm_sockets.h
PORTS = itertools.count(20_000)
# The guest's Python may be another one than the host's.
VSHD_PYTHON = os.environ.get("VSHD_PYTHON", sys.executable)
# Guests start Python so; the daemon must not need more.
START = "import sys; sys.path.insert(0, {!r}); from vshd.__main__ import main; sys.exit(main())"
# Whom a session without a user runs as: vshd takes root, and another user's can serve that user alone.
DEFAULT_USER = "root" if os.geteuid() == 0 else str(os.geteuid())
OWN_USER = [] if os.geteuid() == 0 else [f"--default_user={DEFAULT_USER}"]
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "PYTHONPATH": str(CHECKOUT),
    "TERM": "xterm",
    "VSH_AF_VSOCK": "" if IS_VSOCK_GUEST else "deny",
    # Whoever runs the tests may have a configuration.
    "VSH_CONFIG": "/nonexistent",
}


class Program(subprocess.Popen[bytes]):
    """A process whose streams are pipes, for a test that uses those it has asked for."""

    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]


P = TypeVar("P", bound=subprocess.Popen[bytes])


# What a program may get as a stream.
Stream = int | IO[bytes]


class RunOptions(TypedDict, total=False):
    """What tests change of subprocess.run()."""

    env: Mapping[str, str]
    input: bytes
    stdin: Stream


class StartOptions(TypedDict, total=False):
    """What tests change of subprocess.Popen()."""

    env: Mapping[str, str]
    stdin: Stream
    stdout: Stream
    stderr: Stream
    process_group: int


class VshdOptions(TypedDict, total=False):
    """The keywords of Vshd()."""

    env: Mapping[str, str] | None
    pass_fds: Sequence[int]
    wrapper: Sequence[str]
    allow_loopback: bool
    ends_sessions: bool


class Vshd:
    """A running vshd. `log` is what it has said so far."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        wrapper: Sequence[str] = (),
        *,
        allow_loopback: bool = True,
        ends_sessions: bool = True,
    ) -> None:
        """ends_sessions: its end is that of its sessions, so that a failed test leaves none behind."""
        self.path = folder / "vshd.sock"
        listen, self.where = f"unix:{self.path}", [f"--unix={self.path}"]
        self._address: str | tuple[int, int] = str(self.path)
        if IS_VSOCK_GUEST:
            cid, port = find_own_cid(), next(PORTS)
            # The kernel's loopback has a CID of its own, 1, for who connects.
            flags = (*flags, *(("--allow_cid=1",) if allow_loopback else ()))
            listen, self.where, self._address = f"vsock:{port}", [f"--cid={cid}", f"--port={port}"], (cid, port)
        self.log_path = folder / "vshd.log"
        notify_path = folder / "notify.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log_path.open("wb") as log:
            notify.bind(str(notify_path))
            notify.settimeout(DEADLINE_S)
            self.process = subprocess.Popen(
                [
                    *wrapper,
                    *(VSHD_PYTHON, "-I", "-S", "-B", "-c", START.format(str(CHECKOUT))),
                    *(f"--listen={listen}", "--log_stderr", "--spare_time=0"),
                    f"--lasting_dir={folder / 'lasting'}",
                    *(["--end_sessions"] if ends_sessions else []),
                    *OWN_USER,
                    *flags,
                ],
                env={**ENVIRONMENT, "NOTIFY_SOCKET": str(notify_path), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
            )
            assert notify.recv(100) == b"READY=1\n"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def argv(self, *words: str, limits: str = "") -> list[str]:
        """limits: words of ulimit, as in "-n 64". A shell sets them: a test with threads must not run code of its own
        between fork() and exec().
        """
        shell = ["sh", "-c", f'ulimit {limits} && exec "$@"', "sh"] if limits else []
        return [*shell, sys.executable, "-m", "vsh", *self.where, *words]

    def run(self, *words: str, limits: str = "", **options: Unpack[RunOptions]) -> "subprocess.CompletedProcess[bytes]":
        """Runs vsh to its end."""
        options.setdefault("env", ENVIRONMENT)
        if "stdin" not in options and "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        return subprocess.run(
            self.argv(*words, limits=limits),
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
            **options,
        )

    def start(self, *words: str, limits: str = "", **options: Unpack[StartOptions]) -> Program:
        """A running vsh."""
        options.setdefault("env", ENVIRONMENT)
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        return Program(self.argv(*words, limits=limits), **options)

    def connect(self) -> socket.socket:
        """A plain connection, for tests that speak frames themselves."""
        connection = socket.socket(socket.AF_VSOCK if IS_VSOCK_GUEST else socket.AF_UNIX)
        connection.connect(self._address)
        connection.settimeout(DEADLINE_S)
        return connection

    def children(self) -> list[int]:
        """The pids of its session processes."""
        text = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(word) for word in text.split()]

    def stop(self) -> int:
        """Ends it as systemd would; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class StartVshd(Protocol):
    """The fixture start_vshd."""

    def __call__(self, *flags: str, **options: Unpack[VshdOptions]) -> Vshd: ...


def is_listening(path: Path) -> bool:
    """Whether a program listens at a UNIX socket. Its path is there earlier: bind(2) comes before listen(2)."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        # Num, RefCount, Protocol, Flags, Type, St, Inode, Path; the flag is __SO_ACCEPTCON.
        words = line.split(maxsplit=7)
        if words[7:] == [str(path)] and int(words[3], 16) & 0x10000:
            return True
    return False


def find_own_cid() -> int:
    """This guest's CID."""
    with Path("/dev/vsock").open("rb") as device:
        return int.from_bytes(fcntl.ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4)), sys.byteorder)


@contextlib.contextmanager
def ended(process: P) -> Iterator[P]:
    """A process that does not outlive the test."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Looks until it is so: for what no descriptor announces."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_for_end(pid: int, timeout_s: float = DEADLINE_S) -> None:
    """Waits until a process that is not our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ready, _, _ = select.select([fd], [], [], timeout_s)
        assert ready, f"process {pid} still runs"
    finally:
        os.close(fd)


def read_line(stream: IO[bytes]) -> str:
    """A line of a process's output, by the deadline."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([stream], [], [], DEADLINE_S)
        assert ready, f"no line, only {line!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"the end after {line!r}"
        line += byte
    return line.decode().strip()


def cpu_seconds(pid: int) -> float:
    """What a process and its reaped children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def kill_group(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
