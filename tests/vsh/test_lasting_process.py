"""Sessions that last, for programs: Client.start, Client.attach and what they return; from a real vshd, and a liar."""

import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.descriptors import nothing_left_open
from tests.vsh.live import DEADLINE_S, IS_VSOCK_GUEST, Vshd
from vsh.address import Address
from vsh.client import Client
from vsh.errors import ExecError, UsageError, VshError
from vsh.pump import TimedOut
from vshd.wire import messages
from vshd.wire.connection import default_limits
from vshd.wire.events import RequestReceived
from vshd.wire.kept import SessionRecord, encode_record
from vshd.wire.server import ServerConnection

ECHO = 'while read line; do echo "got $line"; [ "$line" = end ] && exit 3; done'

pytestmark = pytest.mark.skipif(IS_VSOCK_GUEST, reason="these addresses are those of UNIX sockets")


@pytest.fixture
def client(vshd: Vshd) -> Client:
    return Client(Address.unix(str(vshd.path)))


def test_program_starts_polls_writes_and_waits(client: Client) -> None:
    session = client.start(["sh", "-c", ECHO], name="program")
    assert session.poll() is None
    session.write(b"one\n")
    again = client.attach("program")
    again.write(b"end\n")
    assert again.wait() == session.wait() == session.poll() == 3
    part = session.read()
    assert (part.stdout, part.stderr, part.offset, part.dropped) == (b"got one\ngot end\n", b"", 16, 0)
    assert session.read(since=8).stdout == b"got end\n"
    session.forget()
    with pytest.raises(ExecError, match="no session has the id or name 'program'") as caught:
        again.wait()
    assert caught.value.kind == messages.NO_SESSION


def test_program_learns_what_it_has_missed(client: Client) -> None:
    session = client.start(["seq", "1", "20000"], output_size=1 << 16)
    session.wait()
    part = session.read(since=100)
    assert part.dropped == part.offset - (1 << 16) - 100
    assert len(part.stdout) == 1 << 16
    assert part.stdout.endswith(b"\n20000\n")


def test_signal_and_its_status(client: Client) -> None:
    session = client.start(["sleep", "1000"], env={"A": "b"}, cwd="/")
    with pytest.raises(UsageError):
        session.signal(0)
    with pytest.raises(TimedOut) as caught:
        session.wait(timeout=0.1)
    assert "goes on" in caught.value.hint
    with pytest.raises(ExecError) as busy:
        session.forget()
    assert busy.value.kind == messages.BUSY
    session.terminate()
    assert session.wait() == session.poll() == -signal.SIGTERM


def test_output_is_followed_to_the_end(client: Client) -> None:
    session = client.start(["sh", "-c", "echo a; read x; echo $x >&2"])
    pieces: list[bytes] = []

    def take(data: bytes) -> None:
        pieces.append(data)
        if data == b"a\n":
            session.write(b"b\n", close=True)

    assert session.follow(take) == 0
    assert pieces == [b"a\n", b"b\n"]


def test_list_has_each_session(client: Client) -> None:
    session = client.start(["true"])
    assert session.id in [other.id for other in client.sessions()]
    session.wait()
    session.forget()
    assert session.id not in [other.id for other in client.sessions()]
    with pytest.raises(VshError, match="no session has the id"):
        session.poll()


def test_nothing_stays_open(client: Client) -> None:
    client.start(["true"]).wait()
    with nothing_left_open():
        session = client.start(["cat"])
        session.write(b"x", close=True)
        session.wait()
        session.read()
        session.look()


def test_command_that_cannot_run(client: Client) -> None:
    with pytest.raises(ExecError) as caught:
        client.start(["/no/such/program"])
    assert caught.value.kind == messages.NOT_FOUND
    with pytest.raises(UsageError):
        client.start("true")


@pytest.mark.parametrize(("code", "number"), [(256, 0), (-1, 0), (1 << 30, 0), (0, 65)])
def test_exit_that_no_process_can_have_is_a_fault(tmp_path: Path, code: int, number: int) -> None:
    """A program may end with what poll() returns, and the low byte of 256 is that of success."""
    record = SessionRecord()
    record.id, record.pid, record.started_s, record.ended_s = b"0123abcd", 7, 1, 2
    record.code, record.signal = code, number

    def serve() -> None:
        peer = listener.accept()[0]
        with peer:
            peer.settimeout(DEADLINE_S)
            server = ServerConnection(default_limits())
            while not any(isinstance(event, RequestReceived) for event in server.receive_data(peer.recv(4096))):
                peer.sendall(server.output.take())
            server.hand_over(7, b"")
            peer.sendall(server.output.take() + encode_record(record))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "peer.sock"))
        listener.listen()
        serving = threading.Thread(target=serve)
        serving.start()
        session = Client(Address.unix(str(tmp_path / "peer.sock"))).attach("0123abcd")
        with pytest.raises(VshError, match="which no process can have"):
            session.poll()
        serving.join(DEADLINE_S)
