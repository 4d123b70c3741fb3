"""Many clients at once: each is served when its turn comes, and strangers of the guest keep none of them out."""

import contextlib
import errno
import os
import queue
import select
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vsh.forward.servers import Echo, connect, read_all, serving
from tests.vsh.live import DEADLINE_S, ENVIRONMENT, Vshd, ended, read_line
from vsh.errors import Busy, ExecError, Unanswered, Unreachable, VshError
from vsh.forward import throttle
from vsh.forward.admissions import WAITING_MAX
from vsh.forward.openings import AT_ONCE_MAX, Openings
from vsh.forward.patience import Patience
from vsh.forward.throttle import LINES_MAX, Throttle
from vshd.carry import endpoints
from vshd.wire import messages


@contextlib.contextmanager
def forwarding(vshd: Vshd, *words: str, **options: Any) -> Iterator[tuple["subprocess.Popen[bytes]", int | str]]:
    """`vsh -N -v ...`, and where its one forward listens."""
    with ended(vshd.start("-v", "-N", *words, **options)) as process:
        kind, _, rest = read_line(process.stderr).split(" at ")[1].split(" for ")[0].partition(":")
        yield process, rest if kind == "unix" else int(rest.rpartition(":")[2])


def read_errors(process: "subprocess.Popen[bytes]") -> list[str]:
    process.terminate()
    assert process.stderr is not None
    return process.stderr.read().decode().splitlines()


def crowd(where: int | str, count: int) -> list[str]:
    """`count` clients at once, each with a word that comes back; what went wrong."""
    wrong: queue.Queue[str] = queue.Queue()
    barrier = threading.Barrier(count)

    def ask(number: int) -> None:
        word = b"client %d" % number
        barrier.wait()
        try:
            with connect(where) as client:
                client.sendall(word)
                if (answer := client.recv(100)) != word:
                    wrong.put(f"{number}: {answer!r}")
        except OSError as error:
            wrong.put(f"{number}: {error}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(wrong.queue)


def test_more_clients_than_sessions_of_the_guest_wait_for_one_another(start_vshd: Any) -> None:
    with (
        serving(Echo) as port,
        forwarding(start_vshd("--max_sessions=3"), "-L", f"0:127.0.0.1:{port}") as (process, here),
    ):
        assert crowd(here, 40) == []
        assert read_errors(process) == []


@pytest.mark.parametrize("files", [64, 250])
def test_more_clients_than_descriptors_wait_for_one_another(vshd: Vshd, files: int) -> None:
    with (
        serving(Echo) as port,
        forwarding(vshd, "-L", f"0:127.0.0.1:{port}", limits=f"-n {files}") as (process, here),
    ):
        assert crowd(here, 60) == []
        assert read_errors(process) == []


def test_burst_of_clients_of_the_guest_is_served(vshd: Vshd) -> None:
    with serving(Echo) as port, forwarding(vshd, "-R", f"0:{port}") as (process, there):
        assert crowd(there, 300) == []
        assert read_errors(process) == []


def test_server_with_a_full_backlog_is_waited_for(vshd: Vshd, tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        with (
            forwarding(vshd, "-L", f"unix:{tmp_path}/here:{path}") as (_, here),
            contextlib.ExitStack() as stack,
        ):
            clients = [stack.enter_context(connect(here)) for _ in range(4)]
            for client in clients:
                client.sendall(b"x")
            # Nothing is refused while the backlog is full.
            assert not select.select(clients, [], [], 0.5)[0]
            for _ in clients:
                accepted, _ = server.accept()
                with accepted:
                    accepted.sendall(accepted.recv(1))
            assert [client.recv(1) for client in clients] == [b"x"] * len(clients)


def test_full_backlog_has_a_deadline(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(0)
        with connect(str(path)), pytest.raises(endpoints.PlaceError, match="Connection timed out"):
            endpoints.connect(f"unix:{path}", 0.1)


def find_back(folder: Path) -> Path:
    """The end of -R that the guest connects to; a program of the guest finds it as easily."""
    [path] = folder.glob("vsh-host-*")
    return path


@pytest.fixture
def reverse(vshd: Vshd, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[bytes]", int | str, Path]]:
    """A forward from the guest to an echo here: its process, where the guest's clients connect, our own end."""
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    with serving(Echo) as port, forwarding(vshd, "-R", f"0:{port}", env=environment) as (process, there):
        yield process, there, find_back(tmp_path)


def test_strangers_that_say_nothing_do_not_keep_the_port_busy(
    reverse: tuple["subprocess.Popen[bytes]", int | str, Path],
) -> None:
    process, there, back = reverse
    with contextlib.ExitStack() as stack:
        for _ in range(3 * WAITING_MAX):
            stack.enter_context(connect(str(back)))
        began_s = time.monotonic()
        assert crowd(there, 5) == []
        # Not after the strangers' time was over.
        assert time.monotonic() < began_s + 5
    lines = read_errors(process)
    assert "was closed: it showed no token, and others came" in lines[0]
    assert len(lines) <= LINES_MAX + 1


@pytest.mark.parametrize(("said", "why"), [(b"x" * 32, "it is not from the guest's vshd"), (b"", "it ended before")])
def test_strangers_cannot_fill_a_terminal(
    reverse: tuple["subprocess.Popen[bytes]", int | str, Path], said: bytes, why: str
) -> None:
    process, there, back = reverse
    for _ in range(100):
        with connect(str(back)) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    assert crowd(there, 1) == []
    lines = read_errors(process)
    assert [why in line for line in lines] == [True] * (LINES_MAX + 1)
    assert f": {100 - LINES_MAX} more like these, the last: " in lines[-1]


def test_token_may_come_in_pieces_and_with_data_behind_it(
    reverse: tuple["subprocess.Popen[bytes]", int | str, Path],
) -> None:
    """A wrong one of the right length is refused however it comes."""
    _, there, back = reverse
    with connect(str(back)) as stranger:
        for _ in range(31):
            stranger.sendall(b"y")
        assert not select.select([stranger], [], [], 0.1)[0]
        stranger.sendall(b"y and more")
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert crowd(there, 1) == []


# The parts.


def test_place_that_is_slow_does_not_hold_up_others() -> None:
    openings = Openings()
    gate = threading.Event()
    slow: list[bool] = []
    quick: list[str] = []

    def refuse(error: VshError) -> None:
        pytest.fail(str(error))

    for _ in range(AT_ONCE_MAX + 5):
        openings.start("slow", lambda: gate.wait(DEADLINE_S), slow.append, refuse)
    openings.start("quick", lambda: "done", quick.append, refuse)

    def serve_until(condition: Callable[[], bool]) -> None:
        while not condition():
            assert select.select([openings.fd], [], [], DEADLINE_S)[0]
            openings.serve()

    serve_until(lambda: bool(quick))
    assert (quick, slow, openings.count) == (["done"], [], AT_ONCE_MAX + 5)
    gate.set()
    serve_until(lambda: openings.count == 0)
    assert len(slow) == AT_ONCE_MAX + 5
    for fd in (openings.fd, openings._waking):
        os.close(fd)


def failing(*errors: VshError) -> Callable[[float], str]:
    """An attempt that fails so, one after another, and then succeeds."""
    left = list(errors)

    def attempt(_timeout_s: float) -> str:
        if left:
            raise left.pop(0)
        return "served"

    return attempt


FULL = [Busy("no place"), ExecError("too many sessions", kind=messages.LIMIT)]


@pytest.mark.parametrize("error", FULL)
def test_client_waits_where_every_place_is_taken(error: VshError) -> None:
    assert Patience(DEADLINE_S).open(failing(error, error), lambda: True) == "served"


@pytest.mark.parametrize("error", [*FULL, Unanswered("nothing"), Unreachable("nobody"), VshError("no")])
def test_client_is_given_up_where_nobody_is_served(error: VshError) -> None:
    with pytest.raises(VshError) as caught:
        Patience(0.0).open(failing(*[error] * 100), lambda: True)
    assert caught.value is error


@pytest.mark.parametrize(
    "error", [Unanswered("not yet"), ExecError("no place", kind=messages.UNREACHABLE, error=errno.ETIMEDOUT)]
)
def test_client_of_a_slow_guest_waits_while_others_are_served(error: VshError) -> None:
    patience = Patience(0.0)

    def slow_twice(_timeout_s: float, left: list[int] = [0, 0]) -> str:  # noqa: B006
        if left:
            left.pop()
            patience.open(failing(), lambda: True)
            raise error
        return "served"

    assert patience.open(slow_twice, lambda: True) == "served"


class CountingEcho(Echo):
    """An echo that counts its connections."""

    count = 0

    def setup(self) -> None:
        super().setup()
        CountingEcho.count += 1


def test_clients_that_reset_before_their_turn_are_not_opened_for(start_vshd: Any) -> None:
    """One session at a time is served, and slowly: behind the first ones nearly all have left before their turn."""
    linger = struct.pack("ii", 1, 0)
    CountingEcho.count = 0
    with (
        serving(CountingEcho) as port,
        forwarding(start_vshd("--max_sessions=1"), "-L", f"0:127.0.0.1:{port}") as (process, here),
        connect(here) as first,
    ):
        first.sendall(b"first")
        assert first.recv(10) == b"first"
        for _ in range(200):
            with connect(here) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        first.close()
        assert crowd(here, 1) == []
        assert read_errors(process) == []
    # Those of the turn in which they left may have been opened.
    assert CountingEcho.count <= 2 + AT_ONCE_MAX


def test_bytes_of_a_client_that_closed_before_its_turn_arrive(start_vshd: Any, tmp_path: Path) -> None:
    """As a program does that logs a line to a UNIX socket and ends."""
    received: queue.Queue[bytes] = queue.Queue()

    class Log(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            received.put(read_all(self.request))

    with (
        serving(Log) as port,
        forwarding(start_vshd("--max_sessions=3"), "-L", f"{tmp_path}/s:127.0.0.1:{port}") as (process, here),
    ):
        for number in range(20):
            with connect(here) as client:
                client.sendall(b"line %d" % number)
        lines = {received.get(timeout=DEADLINE_S) for _ in range(20)}
        assert lines == {b"line %d" % number for number in range(20)}
        assert read_errors(process) == []


def test_client_that_has_gone_is_not_opened_for() -> None:
    with pytest.raises(Busy):
        Patience(DEADLINE_S).open(failing(Busy("no place")), lambda: False)


def test_number_of_held_lines_is_told_when_the_period_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throttle, "PERIOD_S", 0.05)
    told: list[str] = []
    lines = Throttle(told.append)
    assert lines.tend() is None
    for number in range(LINES_MAX + 3):
        lines.say(str(number))
    assert told == [str(number) for number in range(LINES_MAX)]
    deadline = time.monotonic() + DEADLINE_S
    while lines.tend() is not None:
        assert time.monotonic() < deadline, "the period does not end"
        time.sleep(0.01)
    assert told[LINES_MAX:] == [f"3 more like these, the last: {LINES_MAX + 2}"]
    lines.say("again")
    assert told[-1] == "again"
