"""Core dumps: the service with the kernel's part played by the test, and the frames that it sends."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S
from tests.vshd.service_thread import serve_in_thread
from vshd.services import cores as service_module
from vshd.services.cores import CoreService, parse_call, read_facts
from vshd.session.refusal import RefusalError
from vshd.wire import cores
from vshd.wire.cores import CoreFacts, CoreReader, encode
from vshd.wire.errors import RemoteProtocolError

MIB = 1 << 20


class Kernel:
    """It plays the kernel for a service: it starts the program of the pattern, and writes a core to its input."""

    def __init__(self, client: socket.socket, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.end = ""
        self._reader = CoreReader()
        self._frames: list[tuple[int, CoreFacts | bytes | int]] = []
        self._dumps: list[threading.Thread] = []

    @property
    def pattern(self) -> str:
        return (self.folder / "core_pattern").read_text()

    def start(self, pid: int | None = None, uid: int | None = None) -> "subprocess.Popen[bytes]":
        numbers = (pid or os.getpid(), os.geteuid() if uid is None else uid, os.getegid(), 11, 1_700_000_000)
        words = self.pattern.removeprefix("|").split()
        for letter, number in zip("Pugst", numbers, strict=True):
            words[words.index(f"%{letter}")] = str(number)
        return subprocess.Popen(words, stdin=subprocess.PIPE, env={})

    def dump(self, core: bytes, pid: int | None = None, uid: int | None = None) -> threading.Thread:
        """Dumps beside the test, as a program dumps beside the host: the pipe is full before the host has read all."""

        # The pattern is that of now.
        helper = self.start(pid, uid)

        def write() -> None:
            with helper:
                assert helper.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    helper.stdin.write(core)
                    helper.stdin.close()
                helper.wait(DEADLINE_S)

        thread = threading.Thread(target=write)
        thread.start()
        self._dumps.append(thread)
        return thread

    def receive(self) -> list[tuple[int, CoreFacts | bytes | int]]:
        """The frames up to the next END."""
        while not any(kind == cores.END for kind, _ in self._frames):
            data = self.client.recv(1 << 16)
            assert data, self.end
            self._frames += self._reader.feed(data)
        count = 1 + [kind for kind, _ in self._frames].index(cores.END)
        frames, self._frames = self._frames[:count], self._frames[count:]
        return frames

    def join(self) -> None:
        for thread in self._dumps:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def make_service(folder: Path, size_max: int = 64 * MIB, pattern: str = "core\n") -> CoreService:
    (folder / "core_pattern").write_text(pattern)
    (folder / "core_pipe_limit").write_text("0\n")
    return CoreService(size_max, str(folder / "place"), str(folder / "core_pattern"), str(folder / "core_pipe_limit"))


@contextlib.contextmanager
def running(service: CoreService, folder: Path) -> Iterator[Kernel]:
    """A service that was opened."""
    ours, theirs = socket.socketpair()
    kernel = Kernel(ours, folder)
    with serve_in_thread(lambda: service, kernel, theirs, b""):
        yield kernel
        kernel.join()


@contextlib.contextmanager
def serving(folder: Path, size_max: int = 64 * MIB) -> Iterator[Kernel]:
    service = make_service(folder, size_max)
    service.open()
    with running(service, folder) as kernel:
        yield kernel


def join(frames: list[tuple[int, CoreFacts | bytes | int]]) -> bytes:
    """The core of frames."""
    core = b""
    for kind, value in frames:
        if kind == cores.DATA and isinstance(value, bytes):
            core += value
        elif kind == cores.HOLE and isinstance(value, int):
            core += bytes(value)
    return core


def change_pattern(folder: Path, pattern: str) -> None:
    """At once, as in /proc."""
    (folder / "new").write_text(pattern)
    (folder / "new").rename(folder / "core_pattern")


def await_pattern(kernel: Kernel, beginning: str) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not kernel.pattern.startswith(beginning):
        assert time.monotonic() < end_s, kernel.pattern
        time.sleep(0.01)


def test_core_arrives_whole_with_its_facts(tmp_path: Path) -> None:
    # More than any buffer between here and there holds.
    core = os.urandom(3 * MIB + 7) + bytes(2 * MIB) + os.urandom(5) + bytes(MIB)
    with (
        serving(tmp_path) as kernel,
        subprocess.Popen([sys.executable, "-c", "input()", "a word"], stdin=subprocess.PIPE) as program,
    ):
        kernel.dump(core, program.pid)
        frames = kernel.receive()
        program.kill()
    facts = frames[0][1]
    assert isinstance(facts, CoreFacts)
    assert (facts.pid, facts.uid, facts.gid, facts.signal) == (program.pid, os.geteuid(), os.getegid(), 11)
    assert facts.time_s == 1_700_000_000
    assert facts.name
    assert facts.exe
    assert not facts.is_contained
    assert join(frames) == core
    assert frames[-1] == (cores.END, cores.WHOLE)
    # Most of the zeros were not sent.
    assert sum(len(value) for _, value in frames if isinstance(value, bytes)) < 5 * MIB
    assert kernel.end == "ended: the host has left"


def test_cores_follow_each_other_and_the_kernels_pattern_is_the_old_one_afterwards(tmp_path: Path) -> None:
    with serving(tmp_path) as kernel:
        assert kernel.pattern.startswith("|/bin/")
        assert len(kernel.pattern) < 128
        assert int((tmp_path / "core_pipe_limit").read_text()) > 0
        for core in (b"one", b"", b"three" * 1000):
            kernel.dump(core)
            assert join(kernel.receive()) == core
    assert kernel.pattern.strip() == "core"


def test_core_over_the_limit_is_cut_and_its_program_is_let_go(tmp_path: Path) -> None:
    with serving(tmp_path, size_max=MIB) as kernel:
        for core in (b"x" * 8 * MIB, bytes(8 * MIB)):
            kernel.dump(core)
            frames = kernel.receive()
            assert sum(len(value) for _, value in frames if isinstance(value, bytes)) <= MIB
            assert frames[-1] == (cores.END, cores.CUT)
        kernel.dump(b"next")
        assert join(kernel.receive()) == b"next"


def test_core_that_pauses_for_long_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's program can make the kernel wait for a page of its memory without end."""
    monkeypatch.setattr(service_module, "PAUSES_S", 0.05)
    with serving(tmp_path) as kernel:
        with kernel.start() as helper:
            frames = kernel.receive()
            assert helper.stdin is not None
            helper.stdin.close()
        assert frames[-1] == (cores.END, cores.BROKEN)
        monkeypatch.setattr(service_module, "PAUSES_S", DEADLINE_S)
        kernel.dump(b"next")
        assert join(kernel.receive()) == b"next"


def test_second_program_waits_for_its_turn_without_its_helper(tmp_path: Path) -> None:
    with serving(tmp_path) as kernel:
        kernel.dump(b"x" * 8 * MIB)
        # The first one has begun, and cannot be done, for nobody reads.
        assert kernel.client.recv(1, socket.MSG_PEEK)
        with kernel.start() as second:
            assert second.stdin is not None
            second.stdin.write(b"second")
            second.stdin.close()
            assert second.wait(DEADLINE_S) == -9
        assert join(kernel.receive()) == b"x" * 8 * MIB
        assert join(kernel.receive()) == b"second"


def test_flood_of_crashes_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BURST", 2)
    monkeypatch.setattr(service_module, "USER_BURST", 2)
    with serving(tmp_path) as kernel:
        for _ in range(2):
            kernel.dump(b"core")
            kernel.receive()
        for _ in range(3):
            # The pipe breaks: nobody takes this one.
            kernel.dump(b"core" * MIB).join(DEADLINE_S)
        monkeypatch.setattr(service_module, "BURST", 3)
        monkeypatch.setattr(service_module, "USER_BURST", 3)
        kernel.dump(b"last")
        frames = kernel.receive()
        assert frames[0] == (cores.LOST, 3)
        assert join(frames) == b"last"


def test_user_who_crashes_without_end_takes_no_core_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "BURST", 4)
    monkeypatch.setattr(service_module, "USER_BURST", 2)
    came = []

    with serving(tmp_path) as kernel:

        def crash(uid: int, count: int, *, kept: int) -> None:
            """Has a user's programs crash one after another, of which so many are kept."""
            for number in range(count):
                thread = kernel.dump(b"core" * MIB, uid=uid)
                if number < kept:
                    facts = next(value for _, value in kernel.receive() if isinstance(value, CoreFacts))
                    came.append(facts.uid)
                thread.join(DEADLINE_S)

        crash(1000, 5, kept=2)
        crash(1001, 1, kept=1)
        # A user may have many numbers, and together the users have no more than root.
        crash(1002, 2, kept=1)
        crash(1003, 2, kept=0)
        crash(0, 5, kept=4)
    assert came == [1000, 1000, 1001, 1002, 0, 0, 0, 0]


def test_core_of_a_service_that_was_killed_comes_over_the_next_one(tmp_path: Path) -> None:
    # It reads nothing any more, and its pattern stays.
    make_service(tmp_path).open()
    pattern = (tmp_path / "core_pattern").read_text()
    ours, theirs = socket.socketpair()
    theirs.close()
    first = Kernel(ours, tmp_path)
    first.dump(b"waits")
    service = make_service(tmp_path, pattern=pattern)
    service.open()
    with running(service, tmp_path) as kernel:
        assert join(kernel.receive()) == b"waits"
    first.join()
    ours.close()
    assert kernel.pattern == "core"


def test_program_is_let_go_where_no_service_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HELPER", service_module.HELPER.replace(b"sleep 10", b"sleep 0.1"))
    service = make_service(tmp_path)
    service.open()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = Kernel(ours, tmp_path).start()
    service.close()
    with helper:
        assert helper.wait(DEADLINE_S) == 0


def test_only_the_owner_can_send_a_core(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with serving(tmp_path):
            place = tmp_path / "place"
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            assert stat.S_IMODE((place / "calls").stat().st_mode) == 0o600
            assert not stat.S_IMODE((place / "helper").stat().st_mode) & 0o077
    finally:
        os.umask(old)


@pytest.mark.parametrize(
    "line", [b"", b"1 2", b"1 2 3 4 5 x", b"1 2 3 4 5 6 7", b"-1 2 3 4 5 6", b"9" * 30 + b" 2 3 4 5 6"]
)
def test_call_that_is_no_call_is_ignored(tmp_path: Path, line: bytes) -> None:
    assert parse_call(line) is None
    with serving(tmp_path) as kernel:
        with (tmp_path / "place" / "calls").open("wb", buffering=0) as pipe:
            pipe.write(line + b"\n")
            # The helper that it names is gone.
            pipe.write(b"999999999 2 3 4 5 6\n")
        kernel.dump(b"core")
        assert join(kernel.receive()) == b"core"


def test_other_process_with_the_number_of_a_helper_is_left_alone(tmp_path: Path) -> None:
    """Calls of a service that was killed wait for the next one, and numbers come again."""
    with (
        serving(tmp_path) as kernel,
        subprocess.Popen([sys.executable, "-c", "print(input())"], stdin=subprocess.PIPE, stdout=-1) as other,
    ):
        with (tmp_path / "place" / "calls").open("wb", buffering=0) as pipe:
            pipe.write(f"{other.pid} 2 3 4 5 6\n".encode())
        kernel.dump(b"core")
        assert join(kernel.receive()) == b"core"
        assert other.communicate(b"its own\n", DEADLINE_S)[0] == b"its own\n"


def test_guest_with_a_program_for_its_cores_is_left_alone(tmp_path: Path) -> None:
    pattern = f"|{sys.executable} %P %u"
    service = make_service(tmp_path, pattern=pattern)
    with pytest.raises(RefusalError, match="the guest's cores go elsewhere"):
        service.open()
    assert (tmp_path / "core_pattern").read_text() == pattern


@pytest.mark.parametrize("pattern", ["|/bin/false", "|/nonexistent/systemd-coredump %P %u", "|", "", "core.%p"])
def test_pattern_that_keeps_no_core_is_replaced(tmp_path: Path, pattern: str) -> None:
    service = make_service(tmp_path, pattern=pattern)
    service.open()
    assert "helper" in (tmp_path / "core_pattern").read_text()
    service.close()
    assert (tmp_path / "core_pattern").read_text() == pattern


def test_pattern_that_the_guest_changes_later_counts_if_it_is_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LOOK_MS", 10)
    with serving(tmp_path) as kernel:
        ours = kernel.pattern
        # systemd does that while it starts.
        change_pattern(tmp_path, "|/nonexistent/systemd-coredump %P")
        await_pattern(kernel, ours)
        change_pattern(tmp_path, f"|{sys.executable} %P")
        assert kernel.client.recv(1) == b""
    assert kernel.pattern == f"|{sys.executable} %P"
    assert kernel.end.startswith("ended: the guest's cores go elsewhere")


def test_facts_of_a_process_that_is_gone_are_empty() -> None:
    facts = read_facts([999_999_999, 1, 2, 3, 4])
    assert (facts.name, facts.command, facts.maps, facts.is_contained) == (b"", b"", b"", False)


def test_frames_are_read_in_pieces_of_any_size() -> None:
    facts = CoreFacts()
    facts.pid, facts.name, facts.is_contained = 7, b"name", True
    stream = encode(cores.LOST, b"\2\0\0\0") + encode(cores.BEGIN, facts.encode())
    stream += encode(cores.DATA, b"some") + encode(cores.DATA, b"") + cores.encode_hole(9) + encode(cores.END, b"\0")
    for size in (1, 2, 7, len(stream)):
        reader = CoreReader()
        frames = [frame for at in range(0, len(stream), size) for frame in reader.feed(stream[at : at + size])]
        assert [kind for kind, _ in frames] == [cores.LOST, cores.BEGIN, cores.DATA, cores.DATA, cores.HOLE, cores.END]
        assert frames[0][1] == 2
        read = frames[1][1]
        assert isinstance(read, CoreFacts)
        assert (read.pid, read.name, read.is_contained) == (7, b"name", True)


@pytest.mark.parametrize(
    "stream",
    [
        encode(cores.DATA, b"without a beginning"),
        encode(cores.END, b"\0"),
        cores.encode_hole(1),
        encode(cores.BEGIN, b"") + encode(cores.BEGIN, b""),
        encode(cores.BEGIN, b"") + encode(cores.LOST, b"\1"),
        b"\x09\0\0\0\0",
        cores.encode_head(cores.DATA, cores.DATA_MAX + 1),
        cores.encode_head(cores.BEGIN, cores.FACTS_MAX + 1),
        encode(cores.BEGIN, b"\xff\xff\xff"),
    ],
)
def test_frames_that_lie_are_refused(stream: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        list(CoreReader().feed(stream))
