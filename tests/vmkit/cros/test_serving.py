"""The process that serves a guest, over UNIX sockets: clients made with grpcio and grpclib, and guests that lie."""

import asyncio
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from h2.config import H2Configuration
from h2.connection import H2Connection

from tests.vmkit.cros.google import CLASSES, make_request
from tests.vsh.live import CHECKOUT, DEADLINE_S, ENVIRONMENT, Program, ended
from vmkit.cros import serving as cros_serving
from vmkit.cros.messages import COLLECT_KERNEL_LOGS, COLLECT_USER_LOGS, VM_READY, LogRequest
from vmkit.cros.notes import DROPPED, LINE
from vmkit.cros.notes import VM_READY as READY_NOTE
from vmkit.cros.serving import CALL_BYTES_MAX, CONNECTIONS_MAX, HostAgent, RateBudget
from vshd.carry.records import LogReader, LogRecord

HEADERS = [
    *((":method", "POST"), (":scheme", "http"), (":path", COLLECT_USER_LOGS), (":authority", "localhost")),
    *(("te", "trailers"), ("content-type", "application/grpc")),
]


class Serving:
    """A running process, and the monitor's end of its notes."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / name for name in ("logs.sock", "ready.sock")]
        self.notes, theirs = socket.socketpair()
        self._read: queue.SimpleQueue[LogRecord] = queue.SimpleQueue()
        listening = []
        for path in self.paths:
            listening.append(socket.socket(socket.AF_UNIX))
            listening[-1].bind(str(path))
            listening[-1].listen()
        fds = [theirs.fileno(), *(sock.fileno() for sock in listening)]
        self.program = Program(
            [sys.executable, "-m", "vmkit.cros", *map(str, fds)],
            pass_fds=fds,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            cwd=CHECKOUT,
        )
        for sock in (theirs, *listening):
            sock.close()
        # As the monitor does: a process whose notes are not read serves nobody.
        self._reading = threading.Thread(target=self._read_notes)
        self._reading.start()

    def _read_notes(self) -> None:
        reader = LogReader()
        while data := self.notes.recv(65536):
            for note in reader.feed(data):
                self._read.put(note)

    def receive(self) -> LogRecord:
        """The next note."""
        return self._read.get(timeout=DEADLINE_S)

    def close(self) -> None:
        """The process has ended."""
        self._reading.join(DEADLINE_S)
        self.notes.close()

    def connect(self, number: int = 0) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE_S)
        sock.connect(str(self.paths[number]))
        return sock


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    made = Serving(tmp_path_factory.mktemp("cros"))
    with ended(made.program):
        yield made
        # None of the tests has ended it, and it says nothing of what guests did wrong.
        made.program.send_signal(signal.SIGTERM)
        assert made.program.communicate(timeout=DEADLINE_S)[1] == b""
        assert made.program.returncode == -signal.SIGTERM
    made.close()


def call(serving: Serving, path: str, request: Any, *, number: int = 0) -> Any:
    """A unary call by grpclib, with Google's messages."""

    async def work() -> Any:
        async with Channel(path=str(serving.paths[number])) as channel:
            unary: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(channel, path, type(request), CLASSES["EmptyMessage"])
            return await unary(request, timeout=DEADLINE_S)

    return asyncio.run(work())


def check_it_serves(serving: Serving) -> None:
    call(serving, COLLECT_USER_LOGS, make_request({"content": b"still here"}))
    while serving.receive().text != b"<13>still here":
        pass


def test_client_of_grpcio_leaves_its_records(serving: Serving) -> None:
    request = make_request(
        {"severity": 4, "time": 5_000_000_006, "content": b" app[1]: failed"}, {"content": b""}, {"content": b"more"}
    )
    line = f"{COLLECT_USER_LOGS} {request.SerializeToString().hex()}\n"
    done = subprocess.run(
        [sys.executable, "-m", "tests.vmkit.maitred.grpcio_program", str(serving.paths[0])],
        input=line.encode(),
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
        env=ENVIRONMENT,
        cwd=CHECKOUT,
    )
    assert done.stdout.split() == [b"OK"], done
    first, second = serving.receive(), serving.receive()
    assert (first.source, first.time_ns, first.text) == (LINE, 5_000_000_006, b"<11>app[1]: failed")
    assert (second.source, second.text) == (LINE, b"<13>more")


def test_guest_reports_that_it_is_ready_as_often_as_it_likes(serving: Serving) -> None:
    for _ in range(2):
        call(serving, VM_READY, CLASSES["EmptyMessage"](), number=1)
        assert serving.receive().source == READY_NOTE


def test_kernels_log_is_not_taken_as_in_chromeos(serving: Serving) -> None:
    with pytest.raises(GRPCError) as caught:
        call(serving, COLLECT_KERNEL_LOGS, make_request())
    assert caught.value.status is Status.UNIMPLEMENTED


def test_record_that_is_none_is_refused(serving: Serving) -> None:
    # A record is a field of bytes on the wire, and these are none.
    request = CLASSES["Timestamp"].FromString(b"\n\3\x08\xff\xff")
    with pytest.raises(GRPCError) as caught:
        call(serving, COLLECT_USER_LOGS, request)
    assert caught.value.status is Status.INVALID_ARGUMENT
    check_it_serves(serving)


class PlayedStream:
    """A call of CollectUserLogs, with so many records."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.answers: list[object] = []

    async def recv_message(self) -> LogRequest:
        request = LogRequest()
        request.merge(make_request(*[{"content": b"flood"}] * self._count).SerializeToString())
        return request

    async def send_message(self, message: object) -> None:
        self.answers.append(message)


def test_lines_above_the_rate_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cros_serving, "TELL_S", 0.0)
    notes: list[LogRecord] = []
    agent = HostAgent(notes.append, RateBudget(30, 1, lambda: 0.0))

    async def work() -> None:
        for count in (20, 20, 20):
            stream = PlayedStream(count)
            await agent.__mapping__()[COLLECT_USER_LOGS].func(cast("Any", stream))
            assert len(stream.answers) == 1
        async with asyncio.timeout(DEADLINE_S):
            while notes[-1].source != DROPPED:
                await asyncio.sleep(0)

    asyncio.run(work())
    assert [note.source for note in notes] == [LINE] * 30 + [DROPPED]
    assert notes[-1].number == 30


def open_call(sock: socket.socket) -> H2Connection:
    """A client that has begun a call."""
    protocol = H2Connection(H2Configuration(client_side=True))
    protocol.initiate_connection()
    protocol.send_headers(1, HEADERS)
    sock.sendall(protocol.data_to_send())
    return protocol


def is_closed_while(sock: socket.socket, protocol: H2Connection, data: bytes) -> bool:
    """Sends data of the call for as long as the server takes it."""
    sent = 0
    try:
        while sent < 4 * CALL_BYTES_MAX:
            room = min(protocol.local_flow_control_window(1), protocol.max_outbound_frame_size)
            if room:
                protocol.send_data(1, data[:room])
                sent += room
                sock.sendall(protocol.data_to_send())
            else:
                received = sock.recv(65536)
                if not received:
                    return True
                protocol.receive_data(received)
    except OSError:
        return True
    return False


def test_call_without_an_end_is_cut_off(serving: Serving) -> None:
    with serving.connect() as sock:
        protocol = open_call(sock)
        # It says that 4 GiB follow.
        protocol.send_data(1, b"\0\xff\xff\xff\xff")
        assert is_closed_while(sock, protocol, bytes(16384))
    check_it_serves(serving)


def test_client_that_reads_no_answers_is_cut_off(serving: Serving) -> None:
    ping = b"\0\0\x08\6\0\0\0\0\0" + bytes(8)
    with serving.connect() as sock:
        open_call(sock)
        with pytest.raises(OSError, match=r"."):
            while True:
                sock.sendall(ping * 1000)
    check_it_serves(serving)


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\1\4\0\0\0\0", bytes(100)],
    ids=["http 1", "headers of no stream", "zeros"],
)
def test_bytes_that_are_no_grpc_end_the_connection(serving: Serving, data: bytes) -> None:
    with serving.connect() as sock:
        sock.sendall(data)
        # What it says before is HTTP/2.
        while sock.recv(65536):
            pass
    check_it_serves(serving)


def test_connections_that_say_nothing_keep_no_client_away(serving: Serving) -> None:
    idle = [serving.connect() for _ in range(CONNECTIONS_MAX + 2)]
    check_it_serves(serving)
    for sock in idle:
        sock.close()


def test_allowance_comes_back_with_time() -> None:
    now_s = [0.0]
    allowance = RateBudget(100, 10, lambda: now_s[0])
    assert allowance.try_take(70) == 70
    assert allowance.try_take(70) == 30
    assert allowance.take(5) == 0.5
    now_s[0] = 1.5
    assert allowance.try_take(70) == 10
    now_s[0] = 1000.0
    assert allowance.take(100) == 0
    assert allowance.try_take(1) == 0
