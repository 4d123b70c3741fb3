"""Forwards on the wire (docs/reference/protocol.md 3), joined in memory and with a server that knows none."""

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.vshd.joined import Joined
from vsh.address import Address
from vsh.errors import VshError
from vsh.forward.guest import connect_guest
from vshd.carry.endpoints import PlaceError, connect
from vshd.flags import Options
from vshd.services.forward import open_service
from vshd.services.table import Surroundings
from vshd.session.refusal import RefusalError
from vshd.wire import messages, state
from vshd.wire.client import STUB_ARGV, STUB_USER, make_service_request
from vshd.wire.events import HandedOver
from vshd.wire.messages import Failure, SetupConnectionRequest, SetupConnectionResponse
from vshd.wire.requests import Forward

SURROUNDINGS = Surroundings(Options(), is_frozen=False, facts=b"", renew=lambda: None)


def ask(joined: Joined, **fields: Any) -> Joined:
    joined.client.send_setup(make_service_request(forward=Forward(**fields)))
    joined.pump()
    return joined


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("size", [10, 5000])
def test_request_arrives_whole_and_the_connection_is_handed_over(chunk: int | None, size: int) -> None:
    joined = ask(Joined(chunk=chunk), connect=b"tcp:localhost:80", user=b"u" * size)
    request = next(event[2]["request"] for event in joined.seen if event[1] == "RequestReceived")
    assert (request.forward.connect, request.forward.user) == (b"tcp:localhost:80", b"u" * size)
    joined.server.hand_over(7, b"where")
    joined.pump()
    assert joined.last("client") == ("HandedOver", {"description": "where"})
    assert joined.client.state == joined.server.state == state.RAW


def test_bytes_behind_the_handshake_are_nobodys_frames() -> None:
    joined = ask(Joined(), connect=b"tcp:localhost:80")
    joined.server.hand_over(7, b"")
    response = joined.server.output.take()
    events = joined.client.receive_data(response + b"\xff\xff\xff\xff raw")
    assert isinstance(events[-1], HandedOver)
    assert joined.client.take_rest() == b"\xff\xff\xff\xff raw"
    assert joined.client.take_rest() == b""


def test_request_is_one_that_others_refuse() -> None:
    """The user exists nowhere, nor does the program, whatever a server makes of the rest."""
    request = make_service_request(forward=Forward(connect=b"tcp:localhost:80"))
    assert (request.target, request.user, request.argv) == (messages.VM_SHELL, STUB_USER, [STUB_ARGV])
    assert b":" in request.user


def test_legacy_server_that_takes_it_for_a_command_is_a_fault() -> None:
    joined = ask(Joined(server=None), connect=b"tcp:localhost:80")
    joined.server.accept(3)
    joined.pump()
    assert joined.last("client")[0] == "Broken"


def test_refusal_is_typed() -> None:
    joined = ask(Joined(), connect=b"tcp:localhost:80")
    joined.server.refuse("no way", Failure(messages.UNREACHABLE, 111))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["failure"].kind, fields["failure"].error) == ("Refused", 11, 111)


def test_vsh_tells_a_server_that_knows_no_forwards(tmp_path: Path) -> None:
    path = str(tmp_path / "legacy")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                size = int.from_bytes(connection.recv(4), "little")
                request = SetupConnectionRequest()
                request.merge(connection.recv(size))
                text = b"could not find user: " + request.user
                payload = SetupConnectionResponse(messages.FAILED, text).encode()
                connection.sendall(len(payload).to_bytes(4, "little") + payload)

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(VshError, match="knows no forwards"):
            connect_guest(Address.unix(path), "tcp:localhost:80", timeout_s=10)
        thread.join()


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, messages.BAD_REQUEST),
        ({"connect": b"x", "listen": b"y"}, messages.BAD_REQUEST),
        ({"listen": b"tcp:localhost:0"}, messages.BAD_REQUEST),
        ({"listen": b"tcp:localhost:0", "back": b"vsock:2:1", "token": bytes(65)}, messages.BAD_REQUEST),
        ({"connect": b"nonsense"}, messages.UNREACHABLE),
        ({"connect": b"tcp:localhost:99999"}, messages.UNREACHABLE),
        ({"connect": b"tcp::1"}, messages.UNREACHABLE),
        ({"connect": b"unix:a\0b"}, messages.UNREACHABLE),
        ({"connect": b"unix:" + b"x" * 200}, messages.UNREACHABLE),
        ({"connect": b"vsock:4294967295:1"}, messages.UNREACHABLE),
        ({"connect": b"vsock:2:1"}, messages.UNREACHABLE),
        ({"listen": b"unix:/nonexistent/x", "back": b"unix:/x"}, messages.UNREACHABLE),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(fields: dict[str, bytes], kind: int) -> None:
    with pytest.raises(RefusalError) as caught:
        open_service(Forward(**fields), -1, SURROUNDINGS)
    assert caught.value.failure.kind == kind


def test_every_address_of_a_name_is_tried() -> None:
    """localhost may be ::1 first, and a server listen at 127.0.0.1 alone."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        connected = socket.socket(fileno=connect(f"tcp:localhost:{server.getsockname()[1]}", 10))
        connected.close()


def test_connect_has_a_deadline(tmp_path: Path) -> None:
    """A full backlog is the loopback's way of not answering."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        with contextlib.ExitStack() as queued, pytest.raises(PlaceError, match="Connection timed out"):
            for _ in range(4):
                queued.enter_context(socket.socket(fileno=connect(f"tcp:127.0.0.1:{port}", 0.3)))
