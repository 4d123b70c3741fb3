"""vsh for programs: Client against a real vshd."""

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.vsh.live import DEADLINE_S, Vshd, wait_until
from vsh.address import Address
from vsh.client import Client
from vsh.errors import ConnectionLost, ExecError, VshError
from vsh.memory import BytesSource, CaptureSink
from vsh.pump import Pump, TimedOut
from vsh.stdio import FdSource
from vshd.wire import messages
from vshd.wire.frames import encode_frame
from vshd.wire.messages import SetupConnectionResponse


@pytest.fixture(params=[True, False], ids=["extended", "legacy"])
def client(vshd: Vshd, request: pytest.FixtureRequest) -> Client:
    return Client(Address.unix(str(vshd.path)), extended=request.param)


def test_result_has_output_and_exit(client: Client) -> None:
    result = client.run(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (result.stdout, result.stderr, result.exit, result.signal) == (b"out\n", b"err\n", 7, 0)


def test_hybrid_address_works(vshd: Vshd) -> None:
    assert Client(Address.hybrid(str(vshd.path))).run(["echo", "hi"]).stdout == b"hi\n"


def test_input_is_given_and_ended(client: Client) -> None:
    data = os.urandom(300_000)
    assert client.run(["cat"], input=data).stdout == data


def test_environment_directory_and_user(client: Client) -> None:
    uid = os.geteuid()
    result = client.run(["sh", "-c", "echo $A; pwd; id -u"], env={"A": "b"}, cwd="/usr", user=str(uid))
    assert result.stdout == b"b\n/usr\n%d\n" % uid


def test_signal_is_told(vshd: Vshd) -> None:
    result = Client(Address.unix(str(vshd.path))).run(["sh", "-c", "kill -9 $$"])
    assert (result.exit, result.signal) == (137, 9)


def test_arguments_that_are_no_text(client: Client) -> None:
    assert client.run([b"printf", b"%s", b"\xff\xfe"]).stdout == b"\xff\xfe"


def test_megabyte_of_arguments(vshd: Vshd) -> None:
    words = ["x" * 1023] * 1024
    result = Client(Address.unix(str(vshd.path))).run(["sh", "-c", "echo $#", "sh", *words])
    assert result.stdout == b"1024\n"


@pytest.mark.parametrize(
    ("argv", "options", "kind", "status"),
    [
        (["no-such-command"], {}, messages.NOT_FOUND, 127),
        (["/etc/passwd"], {}, messages.NOT_EXECUTABLE, 126),
        (["/"], {}, messages.NOT_EXECUTABLE, 126),
        (["true", "x" * (128 << 10)], {}, messages.TOO_LONG, 126),
        (["true"], {"cwd": "/no/such"}, messages.BAD_DIRECTORY, 1),
        (["true"], {"user": "nobody-of-this-name"}, messages.BAD_USER, 1),
        (["tr\0ue"], {}, messages.BAD_REQUEST, 1),
        (["true", "a\0b"], {}, messages.BAD_REQUEST, 1),
        (["true"], {"env": {"A=B": "x"}}, messages.BAD_REQUEST, 1),
        (["true"], {"env": {"": "x"}}, messages.BAD_REQUEST, 1),
        (["true"], {"env": {"A": "\0"}}, messages.BAD_REQUEST, 1),
        (["true"], {"cwd": "/a\0b"}, messages.BAD_DIRECTORY, 1),
        ([""], {}, messages.NOT_FOUND, 127),
    ],
)
def test_failure_before_exec_is_typed(
    vshd: Vshd, argv: list[str], options: dict[str, Any], kind: int, status: int
) -> None:
    with pytest.raises(ExecError) as caught:
        Client(Address.unix(str(vshd.path))).run(argv, **options)
    assert (caught.value.kind, caught.value.status) == (kind, status)


def test_interpreter_that_is_missing(vshd: Vshd, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(ExecError, match="its interpreter is not there") as caught:
        Client(Address.unix(str(vshd.path))).run([str(script)])
    assert caught.value.status == 126


def test_program_of_another_processor_is_no_script(vshd: Vshd, tmp_path: Path) -> None:
    program = tmp_path / "program"
    # An ELF header of arm64, little endian.
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\0\xb7\0" + bytes(44))
    program.chmod(0o755)
    with pytest.raises(ExecError, match="program: Exec format error") as caught:
        Client(Address.unix(str(vshd.path))).run([str(program)])
    assert caught.value.status == 126
    assert caught.value.hint == "the program is for another processor than the guest's, or damaged"


def test_script_without_a_format_is_run_by_the_shell(vshd: Vshd, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$0 $1"\n')
    script.chmod(0o755)
    assert Client(Address.unix(str(vshd.path))).run([str(script), "x"]).stdout == f"{script} x\n".encode()


def test_timeout_ends_the_command(client: Client, vshd: Vshd) -> None:
    started = time.monotonic()
    with pytest.raises(TimedOut):
        client.run(["sleep", "97"], timeout=0.3)
    assert time.monotonic() - started < 10
    wait_until(lambda: not vshd.children(), "the session has ended")


def test_output_limit_is_kept(client: Client) -> None:
    with pytest.raises(VshError, match="wrote more than 1000 bytes"):
        client.run(["yes"], output_limit_bytes=1000)


def test_session_with_a_terminal(client: Client) -> None:
    session = client.open_session(["sh", "-c", "stty size; tty >/dev/null && echo tty"], size=(33, 111))
    sink = CaptureSink(10_000)
    try:
        end = Pump(session, BytesSource(b""), {messages.STDOUT: sink}, has_pty=True).run()
    finally:
        session.close()
    assert (end.code, sink.take()) == (0, b"33 111\r\ntty\r\n")


def test_resize_goes_before_what_was_typed_after_it(vshd: Vshd) -> None:
    """poll() may return for the typed line alone, although the signal of the resize came before it."""
    session = Client(Address.unix(str(vshd.path))).open_session(["sh", "-c", "read x; stty size"], size=(33, 111))
    sink = CaptureSink(10_000)
    reading, writing = os.pipe()
    os.write(writing, b"line\n")
    sizes = [(44, 122)]

    def look() -> None:
        if sizes:
            session.connection.send_resize(*sizes.pop())

    try:
        pump = Pump(session, FdSource(reading), {messages.STDOUT: sink}, has_pty=True)
        pump.on_wakeup = look
        pump.run()
    finally:
        session.close()
        os.close(reading)
        os.close(writing)
    assert sink.take().splitlines()[-1] == b"44 122"


def test_any_signal_reaches_the_target(vshd: Vshd) -> None:
    client = Client(Address.unix(str(vshd.path)))
    session = client.open_session(["sh", "-c", "trap 'exit 5' USR2; echo ready; while :; do read x; done"])
    try:
        while not session.receive():
            assert select.select([session.fd], [], [], DEADLINE_S)[0]
        assert session.connection.send_signal(12)
        session.flush()
        end = Pump(session, BytesSource(b""), {}).run()
    finally:
        session.close()
    assert end.code == 5


def test_run_without_a_command(client: Client) -> None:
    with pytest.raises(VshError, match="needs a command"):
        client.run([])


# A peer that misbehaves.


class StartPeer(Protocol):
    """The fixture peer."""

    def __call__(self, data: bytes, *, stays: bool = False) -> Client: ...


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[StartPeer]:
    """A server that answers a request with the given bytes and hangs up."""
    path = str(tmp_path / "peer.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    threads = []

    def answer(data: bytes, *, stays: bool = False) -> Client:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(data)
                if stays:
                    connection.recv(1)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return Client(Address.unix(path), timeout_s=0.5 if stays else 10.0)

    yield answer
    for thread in threads:
        thread.join()
    listener.close()


READY = encode_frame(SetupConnectionResponse(messages.READY, b"vsh ready", 1).encode(), 4096)


@pytest.mark.parametrize("data", [READY, READY[:5] + READY[5:], READY + b"\x05\0\0\0\x0a"])
def test_lost_connection_is_123(peer: StartPeer, data: bytes) -> None:
    with pytest.raises(ConnectionLost, match="lost the connection") as caught:
        peer(data).run(["true"])
    assert caught.value.status == 123


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff\xff", b"HTTP/1.1 400 Bad Request\r\n", READY[:7]])
def test_no_answer_is_no_session(peer: StartPeer, data: bytes) -> None:
    with pytest.raises(VshError, match="closed the connection without an answer"):
        peer(data).run(["true"])


def test_silent_server_is_given_up(peer: StartPeer) -> None:
    with pytest.raises(VshError, match="does not answer"):
        peer(b"", stays=True).run(["true"])
