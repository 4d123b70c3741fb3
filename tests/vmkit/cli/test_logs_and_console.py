"""logs and console: of running machines, of ended ones, through pipes and a terminal."""

import contextlib
import itertools
import json
import os
import pty
import select
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.cli.conftest import Program, Vmkit
from tests.vsh.live import wait_until
from tests.vsh.test_text import HOSTILE, SEEN
from tests.vsh.typist import Typist
from vmkit.machine import running, sinks
from vmkit.machine.attach import MAX_TYPED_BYTES, Attachment
from vmkit.machine.registry import reserve
from vmkit.machine.running import LOG_KINDS

DEADLINE_S = 30.0
# The records of a syslog are rendered.
AS_THEY_ARE = sorted(LOG_KINDS.keys() - {"syslog"})


@pytest.fixture
def machine(folders: Path) -> Iterator[Path]:
    """The directory of an entry `m` that is held, with a log of every kind."""
    with reserve("m", 3, "tiny", {"pid": os.getpid()}) as reservation:
        for kind, name in LOG_KINDS.items():
            (reservation.directory / name).write_text(f"this is {kind}\n")
        yield reservation.directory


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_log_of_every_kind_is_printed(vmkit: Vmkit, machine: Path, kind: str) -> None:
    assert vmkit("logs", "--kind", kind).out == f"this is {kind}\n"


@pytest.mark.parametrize("word", ["m", "3"])
def test_console_log_is_what_logs_means(vmkit: Vmkit, machine: Path, word: str) -> None:
    assert vmkit("logs", word).out == "this is console\n"
    assert vmkit("logs", word, "--path").out == f"{machine}\n"


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_log_is_shown_without_what_steers_a_terminal(program: Program, machine: Path, kind: str) -> None:
    (machine / LOG_KINDS[kind]).write_bytes(HOSTILE + b"\n")
    assert program("logs", "m", "--kind", kind).stdout == SEEN.encode() + b"\n"


def test_bytes_of_a_log_are_printed_as_they_are_when_asked_for(program: Program, machine: Path) -> None:
    (machine / "console.log").write_bytes(bytes(range(256)))
    assert program("logs", "m", "--raw").stdout == bytes(range(256))


def test_missing_log_is_told(vmkit: Vmkit, machine: Path) -> None:
    (machine / "vsock.log").unlink()
    done = vmkit("logs", "m", "--kind", "vsock")
    assert (done.status, done.err) == (1, f"vmkit: there is no vsock log in {machine}\n")


def test_log_that_may_not_be_read_is_told(vmkit: Vmkit, machine: Path) -> None:
    (machine / "console.log").unlink()
    (machine / "console.log").mkdir()
    done = vmkit("logs", "m")
    assert done.status == 1
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../m", "/etc", "a/b", "m/../../..", "x\0y", "-x", "x" * 5000, ".old.m.1"]
)
def test_logs_takes_names_only(vmkit: Vmkit, machine: Path, folders: Path, name: str) -> None:
    (folders / "state" / "console.log").write_text("not a machine's")
    (folders / "console.log").write_text("not a machine's")
    done = vmkit("logs", "--", name)
    assert done.status == 64
    assert "cannot be a machine's name" in done.err
    assert done.out == ""


def test_logs_of_a_machine_that_ended_badly_are_kept(up: Vmkit, vmkit: Vmkit, folders: Path) -> None:
    assert up("panic", "-q").status == 1
    assert "Kernel panic - not syncing: VFS" in vmkit("logs", "my").out
    events = [json.loads(line) for line in vmkit("logs", "my", "--kind", "events").out.splitlines()]
    assert events[-1]["event"] == "end"
    assert vmkit("logs", "my", "--path").out == f"{folders / 'state' / 'my'}\n"
    exact, _, by_hand = vmkit("logs", "my", "--kind", "argv").out.splitlines()
    assert " -S " in exact
    assert " -S " not in by_hand


def test_following_an_ended_machines_log_ends(up: Vmkit, vmkit: Vmkit) -> None:
    up("panic", "-q")
    assert "Kernel panic" in vmkit("logs", "-f", "my").out


@pytest.mark.parametrize("words", [[], ["-f"], ["--kind", "sessions"], ["--kind", "sessions", "-f"]])
def test_logs_of_nobody_are_told(vmkit: Vmkit, words: list[str]) -> None:
    done = vmkit("logs", "nobody", *words)
    assert done.status == 1
    assert done.err.startswith("vmkit: there are no logs of 'nobody'")


def put_syslog(machine: Path, *texts: str, name: str = "syslog.jsonl") -> None:
    lines = [
        json.dumps({"t": 1e9, "time": 1e9, "priority": priority, "ident": "app", "pid": 7, "uid": 1000, "text": text})
        for text, priority in zip(texts, itertools.cycle(("info", "err")), strict=False)
    ]
    (machine / name).write_text("".join(line + "\n" for line in lines))


def test_syslog_is_a_line_for_each_record_of_both_files(program: Program, machine: Path) -> None:
    put_syslog(machine, "oldest", name="syslog.jsonl.1")
    put_syslog(machine, "new\nkernel: forged", "bad \x1b[31m")
    with (machine / "syslog.jsonl").open("ab") as file:
        file.write(b'noise\n[1]\n{"text": "half a li')
    done = program("logs", "m", "--kind", "syslog", "--raw")
    assert [line.partition(b" info")[2] or line.partition(b" err")[2] for line in done.stdout.splitlines()] == [
        b"   app[7] uid=1000: oldest",
        b"   app[7] uid=1000: new\\nkernel: forged",
        b"    app[7] uid=1000: bad \\x1b[31m",
    ]
    # No monitor of this entry can be asked.
    assert done.stderr.startswith(b"vmkit: the newest lines may be missing: the monitor of 'm' does not answer")


def test_syslog_can_be_chosen_from_and_be_json(program: Program, machine: Path) -> None:
    put_syslog(machine, "one", "two", "three", "four")

    def read(*words: str) -> list[str]:
        done = program("logs", "m", "--kind", "syslog", "--json", *words)
        return [json.loads(line)["text"] for line in done.stdout.splitlines()]

    assert read() == ["one", "two", "three", "four"]
    assert read("--priority", "error") == ["two", "four"]
    assert read("--grep", "app: t") == ["two", "three"]
    assert read("--grep", "o", "--priority", "3") == ["two", "four"]
    assert read("--since", "1h") == []
    assert read("--since", "2001-09-08") == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    "words", [["--since", "1h"], ["--priority", "err"], ["--grep", "x"], ["--json"], ["--to", "syslog"]]
)
def test_options_of_the_syslog_need_it(vmkit: Vmkit, machine: Path, words: list[str]) -> None:
    done = vmkit("logs", "m", *words)
    assert (done.status, done.err) == (64, f"vmkit: {words[0]} needs --kind syslog\n")


def test_syslog_is_followed(machine: Path) -> None:
    put_syslog(machine, "one")
    argv = [sys.executable, "-m", "vmkit", "logs", "m", "--kind", "syslog", "-f"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as follower:
        try:
            assert follower.stdout is not None
            assert follower.stdout.readline().endswith(b": one\n")
            with (machine / "syslog.jsonl").open("a") as file:
                file.write('{"t": 1, "text": "two"}\n')
            assert follower.stdout.readline().endswith(b": two\n")
        finally:
            follower.kill()


def test_syslog_is_sent_to_the_hosts_own(
    vmkit: Vmkit, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_syslog(machine, "one", "two")
    monkeypatch.setattr(sinks, "SYSLOG_SOCKET", str(tmp_path / "log"))
    words = ["logs", "m", "--kind", "syslog", "--to", "syslog", "--priority", "err"]
    done = vmkit(*words)
    assert (done.status, done.err.splitlines()[0]) == (
        1,
        f"vmkit: cannot send to {tmp_path / 'log'}: No such file or directory",
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        daemon.settimeout(DEADLINE_S)
        done = vmkit(*words)
        assert (done.status, done.out) == (0, "")
        assert daemon.recv(65536) == b"<11>vmkit-None: app[7] uid=1000: two"


def test_machine_without_a_syslog_is_told(vmkit: Vmkit, machine: Path) -> None:
    (machine / "syslog.jsonl").unlink()
    done = vmkit("logs", "m", "--kind", "syslog")
    assert done.status == 1
    assert done.err.startswith("vmkit: there is no syslog of 'm': the monitor of 'm' does not answer")


def wait_until_read(log: Path) -> None:
    """Until a descriptor of this process stands at the end of the file."""
    deadline_s = time.monotonic() + DEADLINE_S
    wanted = log.stat()
    while True:
        for fd in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), wanted) and os.lseek(fd, 0, os.SEEK_CUR) == wanted.st_size:
                    return
        assert time.monotonic() < deadline_s, f"{log} is not read"
        time.sleep(0.01)


def test_following_goes_on_over_a_log_that_rolls_and_ends_with_the_machine(
    folders: Path, vmkit: Vmkit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "FOLLOW_POLL_S", 0.01)
    written = threading.Event()

    def live() -> None:
        with reserve("m", 3, "tiny", {"pid": os.getpid()}) as reservation:
            log = reservation.directory / "console.log"
            log.write_text("1\n")
            written.set()
            for number in range(2, 6):
                # A reader that is slower than two rolls has lost a file.
                wait_until_read(log)
                with log.open("a") as file:
                    file.write(f"{number}a\n")
                log.rename(log.with_suffix(".log.1"))
                log.write_text(f"{number}b\n")
            wait_until_read(log)
            with log.open("a") as file:
                file.write("last\n")
            wait_until_read(log)

    thread = threading.Thread(target=live)
    thread.start()
    written.wait(DEADLINE_S)
    done = vmkit("logs", "--follow", "m")
    thread.join()
    assert done.out.split() == ["1", "2a", "2b", "3a", "3b", "4a", "4b", "5a", "5b", "last"]


# ---- console ---------------------------------------------------------------------------------------------------------


class Attached:
    """A real `vmkit console` at a console that is played here."""

    def __init__(self, directory: Path, stdin: int, stdout: int | None = None) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(directory / "console.sock"))
        self.listener.listen()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vmkit", "console", "m"], stdin=stdin, stderr=subprocess.PIPE, stdout=stdout
        )
        self.listener.settimeout(DEADLINE_S)
        self.guest, _ = self.listener.accept()
        self.guest.settimeout(DEADLINE_S)

    def end(self) -> int:
        self.guest.close()
        self.listener.close()
        self.process.communicate(timeout=DEADLINE_S)
        return self.process.wait(DEADLINE_S)


def read_until(fd: int, what: bytes) -> bytes:
    seen = b""
    while what not in seen:
        assert select.select([fd], [], [], DEADLINE_S)[0], f"{what!r} did not come, but {seen!r}"
        seen += os.read(fd, 65536)
    return seen


def test_console_in_a_terminal_is_raw_until_ctrl_bracket(machine: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    attached = Attached(machine, theirs, stdout=theirs)
    attached.guest.sendall(b"login: ")
    read_until(ours, b"login: ")
    os.write(ours, b"root\r\x03")
    assert attached.guest.recv(100) == b"root\r\x03"
    os.write(ours, b"bye\x1dnot typed")
    assert attached.guest.recv(100) == b"bye"
    _, err = attached.process.communicate(timeout=DEADLINE_S)
    assert attached.process.returncode == 0
    assert err == b"vmkit: the console of 'm'; Ctrl-] leaves\n"
    assert termios.tcgetattr(theirs) == before
    attached.end()
    os.close(ours)
    os.close(theirs)


def test_console_leaves_a_terminal_as_it_was_when_it_is_terminated(machine: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    attached = Attached(machine, theirs, stdout=theirs)
    attached.guest.sendall(b"login: ")
    read_until(ours, b"login: ")
    attached.process.terminate()
    attached.process.communicate(timeout=DEADLINE_S)
    assert attached.process.returncode == 128 + 15
    assert termios.tcgetattr(theirs) == before
    attached.end()
    os.close(ours)
    os.close(theirs)


def test_console_in_the_background_shows_and_leaves_the_terminal_alone(machine: Path) -> None:
    """As under timeout(1): it is not stopped; in the foreground it takes what is typed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(machine / "console.sock"))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        typist = Typist(["bash", "--norc", "--noprofile", "-i"], env=dict(os.environ))
        try:
            typist.type(f"PS1='%%'; {sys.executable} -m vmkit console m &\r".encode())
            console, _ = listener.accept()
            console.sendall(b"login: ")
            typist.expect(b"login: ")
            typist.type(b"echo sh''ell $(jobs | grep -c Running)\r")
            typist.expect(b"shell 1\r\n")
            typist.type(b"fg\r")
            typist.expect(b"console m")
            wait_until(lambda: is_raw(typist.slave), "the console has the terminal")
            typist.type(b"root\r\x03")
            assert console.recv(100) == b"root\r\x03"
            typist.stop_foreground()
            typist.expect(b"Stopped")
            typist.expect(b"%%")
            typist.type(b"fg\r")
            typist.expect(b"console m")
            wait_until(lambda: is_raw(typist.slave), "the console has the terminal again")
            typist.type(b"\x1d")
            typist.expect(b"%%")
            typist.type(b"exit\r")
            typist.wait()
            console.close()
            assert typist.is_restored()
        finally:
            typist.close()


def is_raw(terminal: int) -> bool:
    return not termios.tcgetattr(terminal)[3] & (termios.ICANON | termios.ISIG)


def test_console_of_a_pipe_types_everything_and_shows_what_comes(machine: Path) -> None:
    text = b"a\x1db" * 100_000
    attached = Attached(machine, subprocess.PIPE, stdout=subprocess.PIPE)

    def feed() -> None:
        assert attached.process.stdin is not None
        attached.process.stdin.write(text)
        attached.process.stdin.close()

    thread = threading.Thread(target=feed)
    thread.start()
    heard = b""
    while len(heard) < len(text):
        heard += attached.guest.recv(65536)
    thread.join()
    assert heard == text
    attached.guest.sendall(b"after the end of its input")
    attached.guest.close()
    assert attached.process.stdout is not None
    assert attached.process.stdout.read() == b"after the end of its input"
    assert attached.process.wait(DEADLINE_S) == 0


def test_ctrl_bracket_is_heard_under_a_guest_that_takes_nothing() -> None:
    ours, theirs = pty.openpty()
    mode = termios.tcgetattr(theirs)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    console, guest = socket.socketpair()
    console.setblocking(False)
    attachment = Attachment(console, theirs, lambda _data: None)
    thread = threading.Thread(target=attachment.run)
    thread.start()
    for _ in range(500):
        os.write(ours, b"x" * 1000)
    os.write(ours, b"\x1d")
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert len(attachment._typed) <= MAX_TYPED_BYTES
    for sock in (console, guest):
        sock.close()
    os.close(ours)
    os.close(theirs)


def test_console_that_lets_go_of_a_slow_terminal_is_told(machine: Path) -> None:
    attached = Attached(machine, subprocess.PIPE)
    assert attached.process.stdin is not None
    attached.process.stdin.write(b"unread")
    attached.process.stdin.flush()
    assert select.select([attached.guest], [], [], DEADLINE_S)[0]
    # Closed with something unread: a reset, as when the monitor aborts.
    attached.guest.close()
    _, err = attached.process.communicate(timeout=DEADLINE_S)
    assert attached.process.returncode == 1
    assert b"vmkit: the monitor closed the console" in err
    attached.listener.close()


def test_console_that_is_not_there_is_told(vmkit: Vmkit, machine: Path) -> None:
    done = vmkit("console", "m")
    assert (done.status, done.err) == (1, "vmkit: the console of 'm' does not answer: No such file or directory\n")


def test_console_without_stdin_shows_until_the_end(machine: Path) -> None:
    (machine / "console.sock").unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(machine / "console.sock"))
    listener.listen()
    process = subprocess.Popen(
        ["sh", "-c", f"exec {sys.executable} -m vmkit console m <&-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    guest, _ = listener.accept()
    guest.sendall(b"shown")
    guest.close()
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out) == (0, b"shown")
    listener.close()
