"""pid 1 of a small guest, as pid 1 of a PID namespace: the kernel's rules are the same, "all processes" are its own."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from typing import Protocol

import pytest

from tests.descriptors import read_descriptors
from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Program, Vshd, ended, is_listening, wait_until
from vsh.address import Address
from vsh.errors import VshError
from vsh.logs import open_logs
from vsh.power_off import ask_to_power_off
from vshd.carry.records import MARK, SYSLOG, LogReader, LogRecord
from vshd.pid1 import init
from vshd.pid1.init import InitError, find_pause_s, find_ready_port

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


needs_namespace = pytest.mark.skipif(not can_unshare(), reason="no PID namespace for a pid 1 of our own (needs root)")


class Guest:
    """A running vshd.pid1.init; `busybox` is a script that notes how it was called."""

    def __init__(self, folder: Path, *flags: str, script: str = "") -> None:
        self.socket = folder / "vshd.sock"
        self.called = folder / "called"
        busybox = folder / "busybox"
        busybox.write_text(f'#!/bin/sh\necho "$@" >{self.called}\n')
        busybox.chmod(0o755)
        program = (
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
            f"import vshd.pid1.init as init\ninit.BUSYBOX = {str(busybox)!r}\n{script}\n"
            f"init.main(['--listen=unix:{self.socket}', '--log_stderr', '--spare_time=0', *{list(flags)!r}])"
        )
        self.process = subprocess.Popen(
            [*NAMESPACE, sys.executable, "-I", "-S", "-B", "-c", program],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def wait_until_ready(self) -> None:
        wait_until(lambda: is_listening(self.socket), "vshd listens")
        # It listens before it tells pid 1 that it is ready, and serves after: a vshd that dies between ends the guest.
        assert self.run("--", "true").returncode == 0
        # A session that outlived its vshd would become pid 1's child, and look like another vshd.
        wait_until(lambda: not any(map(list_children, self.vshd)), "the session has ended")

    @property
    def pid(self) -> int:
        """Its pid 1, as seen from here."""
        return list_children(self.process.pid)[0]

    @property
    def vshd(self) -> list[int]:
        return list_children(self.pid)

    def run(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        argv = [sys.executable, "-m", "vsh", f"--unix={self.socket}", *words]
        return subprocess.run(argv, env=ENVIRONMENT, capture_output=True, timeout=DEADLINE_S, check=False)

    def finish(self) -> str:
        """Waits for its end; what it said on the console."""
        _, console = self.process.communicate(timeout=DEADLINE_S)
        return console.decode()

    def finish_with_errors(self) -> list[str]:
        """The same, but the lines of init's errors alone."""
        return [line for line in self.finish().splitlines() if line.startswith("vmkit-init: error: ")]


def list_children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class StartGuest(Protocol):
    """The fixture start_guest."""

    def __call__(self, *flags: str, script: str = "") -> Guest: ...


@pytest.fixture
def start_guest(tmp_path: Path) -> Iterator[StartGuest]:
    guests: list[Guest] = []

    def start(*flags: str, script: str = "") -> Guest:
        guests.append(Guest(tmp_path, *flags, script=script))
        return guests[-1]

    yield start
    for guest in guests:
        with ended(guest.process):
            pass


@needs_namespace
@pytest.mark.parametrize(
    ("number", "way"), [(signal.SIGUSR2, "poweroff"), (signal.SIGTERM, "reboot"), (signal.SIGUSR1, "halt")]
)
def test_init_goes_down_as_busybox_would(start_guest: StartGuest, number: signal.Signals, way: str) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    assert guest.run("--", "echo", "hi").stdout == b"hi\n"
    os.kill(guest.pid, number)
    assert "error" not in guest.finish()
    assert guest.called.read_text() == f"{way} -f\n"


@needs_namespace
def test_init_ends_what_ignores_term(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    script = "trap '' TERM HUP; echo up; while :; do sleep 5; done"
    argv = [sys.executable, "-m", "vsh", f"--unix={guest.socket}", "--", "sh", "-c", script]
    with ended(Program(argv, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)) as client:
        assert client.stdout.readline() == b"up\n"
        os.kill(guest.pid, signal.SIGUSR2)
        guest.finish()
        assert guest.called.read_text() == "poweroff -f\n"
        assert client.wait(DEADLINE_S) == 123


@needs_namespace
def test_init_is_told_to_power_off_through_vsh(start_guest: StartGuest) -> None:
    """What `vmkit down` does: a command in the guest signals pid 1."""
    guest = start_guest()
    guest.wait_until_ready()
    guest.run("--", "sh", "-c", "kill -USR2 1")
    guest.finish()
    assert guest.called.read_text() == "poweroff -f\n"


@needs_namespace
def test_init_is_told_to_power_off_by_the_request_for_it(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    ask_to_power_off(Address.unix(str(guest.socket)), timeout_s=DEADLINE_S)
    guest.finish()
    assert guest.called.read_text() == "poweroff -f\n"


def test_vshd_of_another_init_refuses_to_end_the_guest(vshd: Vshd) -> None:
    with pytest.raises(VshError, match="without --power_off"):
        ask_to_power_off(Address.unix(str(vshd.path)), timeout_s=DEADLINE_S)


@needs_namespace
def test_init_reaps_orphans(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    for _ in range(5):
        guest.run("--", "sh", "-c", "setsid sh -c 'exit 0' & exit 0")

    def zombies() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in guest.vshd]
        return sum(stat.rpartition(")")[2].split()[0] == "Z" for stat in stats)

    wait_until(lambda: zombies() == 0 and len(guest.vshd) == 1, "only vshd is left")


@needs_namespace
def test_init_starts_a_service_once_vshd_is_ready_and_tells_of_its_end(start_guest: StartGuest, tmp_path: Path) -> None:
    out, service = tmp_path / "out", tmp_path / "service"
    # It looks for vshd's socket: nothing of the boot waits for a service.
    service.write_text(f"#!/bin/sh\ntest -S {tmp_path}/vshd.sock && echo started >> {out}\n")
    service.chmod(0o755)
    guest = start_guest(f"--init_service={service}", "--init_service=/nonexistent")
    guest.wait_until_ready()
    wait_until(lambda: out.exists() and len(guest.vshd) == 1, "the service has ended")
    assert out.read_text() == "started\n"
    os.kill(guest.pid, signal.SIGUSR2)
    console = guest.finish()
    assert f"warning: {service} ended with 0" in console
    assert "error: /nonexistent cannot be started: No such file or directory" in console


@needs_namespace
def test_init_restarts_a_vshd_that_dies(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    (first,) = guest.vshd
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: guest.vshd and guest.vshd != [first], "another vshd runs")
    wait_until(lambda: guest.run("--", "echo", "again").stdout == b"again\n", "it serves")


@needs_namespace
def test_sessions_outlive_a_restart_of_vshd_and_end_with_the_guest(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    argv = [sys.executable, "-m", "vsh", f"--unix={guest.socket}", "--", "sh", "-c", "echo in; cat"]
    with ended(Program(argv, env=ENVIRONMENT, stdin=PIPE, stdout=PIPE, stderr=PIPE)) as client:
        assert client.stdout.readline() == b"in\n"
        (first,) = guest.vshd
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: first not in guest.vshd, "vshd has ended")
        wait_until(lambda: guest.run("--", "echo", "again").stdout == b"again\n", "the next one serves")
        client.stdin.write(b"still\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"still\n"
        os.kill(guest.pid, signal.SIGUSR2)
        assert "error" not in guest.finish()
        assert client.wait(DEADLINE_S) == 123
        assert b"vshd is shutting down" in client.stderr.read()


@needs_namespace
def test_init_starts_a_vshd_that_keeps_dying_after_growing_pauses(start_guest: StartGuest) -> None:
    guest = start_guest()
    guest.wait_until_ready()
    killed: set[int] = set()

    def kill_next() -> bool:
        for pid in set(guest.vshd) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        return len(killed) == 5

    wait_until(kill_next, "five have died")
    wait_until(lambda: guest.run("--", "echo", "again").stdout == b"again\n", "the sixth serves")
    os.kill(guest.pid, signal.SIGUSR2)
    pauses = ["at once", "in 0.1 s", "in 0.2 s", "in 0.4 s", "in 0.8 s"]
    lines = [f"vmkit-init: error: vshd ended with -9; it is started again {pause}" for pause in pauses]
    assert guest.finish_with_errors() == lines


@needs_namespace
def test_log_is_there_before_the_hook_and_its_collector_starts_again(start_guest: StartGuest, tmp_path: Path) -> None:
    log, handed, hook = tmp_path / "log", tmp_path / "handed", tmp_path / "hook"
    send = f"import socket; s = socket.socket(1, 2); s.connect({str(log)!r})"
    # More than the socket holds.
    hook.write_text(f"#!{sys.executable}\n{send}\nfor n in range(1000): s.send(b'<14>hook: %d' % n)\n")
    hook.chmod(0o755)
    guest = start_guest(f"--init_log={log}", f"--logs={handed}", f"--init_hook={hook}")
    wait_until(lambda: is_listening(guest.socket), "vshd listens")

    def write(text: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as program:
            program.connect(str(log))
            program.send(text.encode())

    texts = [record.text for record in read_log(guest) if record.source == SYSLOG]
    assert texts == [b"<14>hook: %d" % number for number in range(1000)]
    # What has handed the connections over may still be ending.
    wait_until(lambda: len(find_others(guest)) == 1, "the collector alone is beside vshd")
    (collector,) = find_others(guest)
    os.kill(collector, signal.SIGKILL)
    wait_until(lambda: collector not in guest.vshd, "the collector has ended")

    def arrives() -> bool:
        write("again")
        return b"again" in [record.text for record in read_log(guest)]

    wait_until(arrives, "another collector has the line")
    os.kill(guest.pid, signal.SIGUSR2)
    assert guest.finish_with_errors() == []


# __SO_ACCEPTCON among the flags of linux/net.h, as /proc/net/unix shows a socket that listens.
ACCEPTS = "00010000"


def find_others(guest: Guest) -> list[int]:
    """The children of pid 1 beside the vshd that listens."""
    return [pid for pid in guest.vshd if not is_vshd_of(pid, guest)]


def is_vshd_of(pid: int, guest: Guest) -> bool:
    """Whether a child of pid 1 is the vshd that listens: a connection that the collector has shows the same path."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    inode = next(words[6] for words in lines if words[7:] == [str(guest.socket)] and words[3] == ACCEPTS)
    return any(target == f"socket:[{inode}]" for _, target in read_descriptors(pid))


def read_log(guest: Guest) -> list[LogRecord]:
    """All that the guest has logged until now."""
    fd, data = open_logs(Address.unix(str(guest.socket)), b"", 0, timeout_s=DEADLINE_S)
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(DEADLINE_S)
        # pid 1 throws the connection away right after the death of a collector.
        with suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(bytes(8))
        reader = LogReader()
        records: list[LogRecord] = []
        while True:
            for record in reader.feed(data):
                if record.source == MARK:
                    return records
                records.append(record)
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return records


def test_pause_grows_to_its_ceiling() -> None:
    pauses = [find_pause_s(deaths) for deaths in (0, 1, 2, 7, 8, 9, 10**9)]
    assert pauses == [0, 0.1, 0.2, 6.4, 10, 10, 10]


@needs_namespace
def test_init_that_cannot_fork_tries_again(start_guest: StartGuest, tmp_path: Path) -> None:
    """As when a user's processes have taken every place: pid 1 must not end the guest for it."""
    refuse_two = """
import os
real_fork, failures = os.fork, []
def fork():
    if os.path.exists(MARK) and len(failures) < 2:
        failures.append(1)
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real_fork()
os.fork = fork
"""
    mark = tmp_path / "mark"
    guest = start_guest(script=f"MARK = {str(mark)!r}\n{refuse_two}")
    guest.wait_until_ready()
    mark.touch()
    (first,) = guest.vshd
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: guest.run("--", "echo", "again").stdout == b"again\n", "the next one serves")
    os.kill(guest.pid, signal.SIGUSR2)
    failure = "vmkit-init: error: vshd cannot be started: Resource temporarily unavailable; it is started again"
    assert guest.finish_with_errors() == [f"{failure} at once", f"{failure} in 0.1 s"]


@needs_namespace
@pytest.mark.parametrize(
    ("flags", "script", "line"),
    [
        (["--listen=vsock:9001"], "", "vmkit-init: error: vshd ended with 1 before it was ready"),
        (["--nonsense"], "", "vmkit-init: error: vshd: ERROR: unknown command line flag 'nonsense'"),
        ([], "init._read_command_line = lambda: 'quiet vmkit.ready=x'", "names no port"),
        ([], "init._read_command_line = lambda: 'vmkit.ready=7777'", "AF_VSOCK is denied"),
        ([], "init.Init.run = lambda self: 1 / 0", "vmkit-init: error: ZeroDivisionError: division by zero"),
    ],
)
def test_init_failure_is_a_line_and_a_power_off(
    start_guest: StartGuest, flags: list[str], script: str, line: str
) -> None:
    guest = start_guest(*flags, script=script)
    console = guest.finish()
    assert line in console
    assert console.count("vmkit-init: error: ") == 1
    assert guest.called.read_text() == "poweroff -f\n"


def test_init_refuses_to_end_what_is_not_its_own() -> None:
    """Outside a guest, "all processes" would be everybody's."""
    argv = [sys.executable, "-c", "import vshd.pid1.init; vshd.pid1.init.main(['--nonsense'])"]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert b"this is not pid 1" in done.stderr


@pytest.mark.parametrize(
    ("line", "port"),
    [("", None), ("quiet panic=-1", None), ("quiet vmkit.ready=7777 x", 7777), ("vmkit.ready=1 vmkit.ready=2", 2)],
)
def test_ready_port_is_found(line: str, port: int | None) -> None:
    assert find_ready_port(line) == port


@pytest.mark.parametrize("word", ["vmkit.ready=", "vmkit.ready=x", "vmkit.ready=-1"])
def test_ready_port_that_is_none(word: str) -> None:
    with pytest.raises(InitError, match="names no port"):
        find_ready_port(word)


def test_ways_down_are_busyboxs() -> None:
    assert {signal.Signals(number).name: way for number, way in init.WAYS_DOWN.items()} == {
        "SIGUSR2": "poweroff",
        "SIGTERM": "reboot",
        "SIGINT": "reboot",
        "SIGUSR1": "halt",
    }
