"""Legacy mode, against what ChromeOS's programs said (docs/reference/protocol.md part 1)."""

from collections.abc import Callable

import pytest

from tests.vshd.joined import Joined
from tests.vshd.transcripts import ECHO, SESSIONS, said_by
from vshd.wire import messages
from vshd.wire.client import ClientConnection
from vshd.wire.connection import Connection, default_limits
from vshd.wire.errors import LocalProtocolError
from vshd.wire.events import Broken, Data, EndOfStream, Established, Event, Exited, Failed, Refused, RequestReceived
from vshd.wire.frames import encode_frame
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.server import ServerConnection


def make_request(env: dict[bytes, bytes], argv: list[bytes]) -> SetupConnectionRequest:
    return SetupConnectionRequest(
        target=messages.VM_SHELL, user=b"root", env={b"TERM": b"xterm", **env}, argv=argv, nopty=True
    )


@pytest.mark.parametrize("name", SESSIONS)
def test_client_says_what_upstreams_client_says(name: str) -> None:
    frames, env, argv, _, stdin, _, _ = SESSIONS[name]
    client = ClientConnection(None)
    client.send_setup(make_request(env, argv))
    client.receive_data(frames[1][1])
    for data in stdin:
        if data:
            client.send_data(messages.STDIN, data)
        else:
            client.send_end(messages.STDIN)
    assert client.output.take() == said_by(frames, "C>S")


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("offers", [False, True], ids=["legacy client", "offering client"])
@pytest.mark.parametrize("chunk", [1, 7, 10**6], ids=["byte by byte", "sevens", "whole"])
def test_client_follows_upstreams_server(name: str, offers: bool, chunk: int) -> None:
    frames, env, argv, pid, _, output, code = SESSIONS[name]
    client = ClientConnection(default_limits() if offers else None)
    client.send_setup(make_request(env, argv))
    said = said_by(frames, "S>C") + b"trailing bytes are ignored"
    seen = []
    received = {messages.STDOUT: b"", messages.STDERR: b""}
    for start in range(0, len(said), chunk):
        for event in client.receive_data(said[start : start + chunk]):
            if isinstance(event, Data):
                received[event.stream] += event.data
            seen.append(event)
    assert isinstance(seen[0], Established)
    assert (seen[0].pid, seen[0].is_extended) == (pid, False)
    assert isinstance(seen[-1], Exited)
    assert (seen[-1].code, seen[-1].signal) == (code, 0)
    for stream in (2, 3):
        expected = b"".join(data for number, data in output if number == stream)
        assert received[stream] == expected
    ends = [event.stream for event in seen if isinstance(event, EndOfStream)]
    assert ends == [stream for stream, data in output if not data]


@pytest.mark.parametrize("name", SESSIONS)
@pytest.mark.parametrize("chunk", [1, 7, 10**6], ids=["byte by byte", "sevens", "whole"])
def test_server_says_what_upstreams_server_says(name: str, chunk: int) -> None:
    frames, env, argv, pid, stdin, output, code = SESSIONS[name]
    server = ServerConnection(default_limits())
    said = said_by(frames, "C>S")
    seen = []

    def take(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, RequestReceived):
                assert (event.request.argv, event.request.user) == (argv, b"root")
                assert event.request.env == {b"TERM": b"xterm", **env}
                assert event.request.nopty
                server.accept(pid)
                take(server.receive_data(b""))
            else:
                seen.append(bytes(event.data) if isinstance(event, Data) else b"")

    for start in range(0, len(said), chunk):
        take(server.receive_data(said[start : start + chunk]))
    for stream, data in output:
        if data:
            server.send_data(stream, data)
        else:
            server.send_end(stream)
    # Legacy mode has no field for the signal.
    server.send_exit(code, signal=9 if name == "killed" else 0)
    assert b"".join(seen) == b"".join(stdin)
    assert server.output.take() == said_by(frames, "S>C")


@pytest.mark.parametrize(
    ("say", "frame"),
    [
        (lambda client: client.send_end(1), "04000000 0a020801"),
        (lambda client: client.send_signal(2), "02000000 2002"),
        (lambda client: client.send_resize(24, 80), "06000000 1a0408181050"),
        (lambda client: client.send_data(1, b"hi\n"), "09000000 0a0708011203 68690a"),
    ],
)
def test_client_frames_byte_for_byte(say: Callable[[ClientConnection], object], frame: str) -> None:
    joined = Joined(client=None).establish()
    say(joined.client)
    assert joined.client.output.take() == bytes.fromhex(frame)


def test_offer_is_skipped_by_a_legacy_server() -> None:
    joined = Joined(server=None).establish(pid=7)
    assert joined.last("client") == ("Established", {"pid": 7, "is_extended": False})
    assert not joined.server.is_extended
    assert joined.client.max_data == 4000


def test_response_to_a_legacy_client_has_no_extension() -> None:
    joined = Joined(client=None).establish(pid=3948)
    assert joined.to_client == ECHO[1][1]


def test_data_is_cut_into_4000_bytes() -> None:
    joined = Joined(client=None).establish()
    data = bytes(range(256)) * 50
    joined.server.send_data(messages.STDOUT, data)
    size = joined.server.output.size
    joined.pump()
    assert joined.data("client", 2) == data
    assert size - len(data) == 4 * 12  # three heads for 4000 bytes, one for 800


@pytest.mark.parametrize("number", [10, 9, 28, 0, 99])
def test_client_has_no_word_for_other_signals(number: int) -> None:
    joined = Joined(client=None).establish()
    assert not joined.client.send_signal(number)
    assert joined.client.output.size == 0


@pytest.mark.parametrize("number", [1, 2, 3, 15])
def test_signals_reach_the_server(number: int) -> None:
    joined = Joined(client=None).establish()
    assert joined.client.send_signal(number)
    joined.pump()
    assert joined.last("server") == ("Signalled", {"number": number})


def test_long_request_cannot_be_said_in_legacy_mode() -> None:
    client = ClientConnection(None)
    with pytest.raises(LocalProtocolError, match="Serialized message too large: 5"):
        client.send_setup(SetupConnectionRequest(argv=[b"x" * 5000]))
    client.send_setup(SetupConnectionRequest(argv=[b"x" * 4000]))


def test_exit_code_may_be_negative() -> None:
    joined = Joined(client=None).establish()
    joined.server.send_exit(-123)
    joined.pump()
    assert joined.last("client") == ("Exited", {"code": -123, "signal": 0, "core_dumped": False})


@pytest.mark.parametrize(
    "frame",
    [
        "00000000",  # an empty message
        "05000000 7a03616263",  # an unknown member
        "06000000 0a0408071200",  # the end of an unknown stream
        "07000000 0a050807120161",  # data of an unknown stream
        "04000000 12020801",  # status READY
    ],
)
def test_client_ignores_what_upstream_ignores(frame: str) -> None:
    joined = Joined(client=None).establish()
    joined.feed(joined.client, bytes.fromhex(frame))
    joined.server.send_exit(3)
    joined.pump()
    assert joined.names("client") == ["Established", "Exited"]


@pytest.mark.parametrize(
    "frame",
    [
        "00000000",
        "05000000 7a03616263",
        "02000000 2009",  # a signal legacy mode does not know
        "04000000 12020801",
        "06000000 88b2190101 00",  # a vendor field: no meaning in legacy mode
    ],
)
def test_server_ignores_what_upstream_ignores(frame: str) -> None:
    joined = Joined(client=None).establish()
    try:
        joined.feed(joined.server, bytes.fromhex(frame))
    finally:
        assert joined.names("server")[:1] == ["RequestReceived"]


def test_server_takes_data_of_any_stream_for_stdin() -> None:
    joined = Joined(client=None).establish()
    joined.feed(joined.server, bytes.fromhex("07000000 0a050803120161"))
    assert joined.last("server") == ("Data", {"stream": 1, "data": b"a"})


def test_data_after_the_end_is_dropped() -> None:
    joined = Joined(client=None).establish()
    joined.feed(joined.server, bytes.fromhex("04000000 0a020801 07000000 0a050801120161 04000000 0a020801"))
    assert joined.names("server") == ["RequestReceived", "EndOfStream"]
    joined.feed(joined.client, bytes.fromhex("04000000 0a020802 07000000 0a050802120161"))
    assert joined.names("client") == ["Established", "EndOfStream"]


@pytest.mark.parametrize("status", [0, 3])
def test_status_other_than_ready_ends_the_session(status: int) -> None:
    joined = Joined(client=None).establish()
    joined.feed(joined.client, _status_frame(status))
    name, fields = joined.last("client")
    assert name == "Failed"
    assert fields["description"] == f"vsh connection has exited abnormally: {status}"
    joined.feed(joined.server, _status_frame(2))
    assert joined.last("server")[0] == "Failed"


def _status_frame(status: int) -> bytes:
    value = messages.ConnectionStatusMessage(status)
    return encode_frame(messages.HostMessage(messages.STATUS_MESSAGE, value).encode(), 4096)


def test_refusal_tells_the_description() -> None:
    joined = Joined(client=None)
    joined.offer()
    joined.server.refuse("could not find user: nope", messages.Failure(messages.BAD_USER))
    joined.pump()
    assert joined.last("client") == (
        "Refused",
        {"description": "could not find user: nope", "failure": None, "is_too_long": False},
    )


def test_description_cannot_write_to_the_terminal() -> None:
    client = ClientConnection(None)
    client.send_setup(SetupConnectionRequest(argv=[b"true"]))
    response = messages.SetupConnectionResponse(messages.FAILED, b"\x1b]0;evil\x07 \xff\n")
    (event,) = client.receive_data(encode_frame(response.encode(), 4096))
    assert isinstance(event, Refused)
    assert event.description.isprintable()


@pytest.mark.parametrize("frame", ["01100000", "02000000 0a05", "01000000 08"])
@pytest.mark.parametrize("side", ["client", "server"])
def test_nonsense_breaks_the_connection(side: str, frame: str) -> None:
    joined = Joined(client=None).establish()
    connection = getattr(joined, side)
    joined.feed(connection, bytes.fromhex(frame))
    name, fields = joined.last(side)
    assert name == "Broken"
    assert not fields["is_end"]
    assert connection.is_finished
    assert connection.receive_data(b"more") == []


def _make_client() -> Connection:
    client = ClientConnection(None)
    client.send_setup(SetupConnectionRequest(argv=[b"x"]))
    return client


# Who listens to the bytes of each side.
MAKERS: dict[str, Callable[[], Connection]] = {
    "S>C": _make_client,
    "C>S": lambda: ServerConnection(default_limits()),
}


@pytest.mark.parametrize("frames", [f[0] for f in SESSIONS.values()], ids=list(SESSIONS))
def test_truncation_at_every_byte_is_noticed(frames: list[tuple[str, bytes]]) -> None:
    """However much of a session came, its early end is Broken, and a whole one is not."""
    for who, make in MAKERS.items():
        said = said_by(frames, who)
        for end in range(len(said) + 1):
            connection = make()
            events = connection.receive_data(said[:end])
            if events and isinstance(events[-1], RequestReceived):
                assert isinstance(connection, ServerConnection)
                connection.accept(1)
                events += connection.receive_data(b"")
            events += connection.receive_end()
            is_whole = who == "S>C" and end == len(said)
            assert isinstance(events[-1], Exited if is_whole else Broken)
            assert connection.is_finished


def test_hasty_client_is_served_in_order() -> None:
    """Everything at once, before the response: nothing is lost."""
    server = ServerConnection(default_limits())
    (event,) = server.receive_data(said_by(SESSIONS["cat"][0], "C>S"))
    assert isinstance(event, RequestReceived)
    server.accept(1)
    data, end = server.receive_data(b"")
    assert isinstance(data, Data)
    assert bytes(data.data) == b"hi\n"
    assert isinstance(end, EndOfStream)


def test_failed_is_a_word_of_the_server_too() -> None:
    joined = Joined(client=None).establish()
    joined.server.send_failure("vshd is shutting down", messages.Failure(messages.SHUTDOWN))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["description"]) == ("Failed", "vshd is shutting down")
    assert isinstance(Failed("", None), Failed)


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.0\r\n\r\n", b"\x00\x10\x00\x00" + b"\xff" * 4096, b"\x02\x00\x00\x00\x0a\x7f"]
)
@pytest.mark.parametrize("offers", [False, True], ids=["legacy server", "extended server"])
def test_first_message_that_is_no_request_is_not_answered(first: bytes, offers: bool) -> None:
    """Upstream's server closes. A HostMessage in place of the response shows as status UNKNOWN at a real client."""
    server = ServerConnection(default_limits() if offers else None)
    (broken,) = server.receive_data(first)
    assert isinstance(broken, Broken)
    server.send_failure(broken.reason, messages.Failure(messages.PROTOCOL))
    assert (server.output.take(), server.is_finished) == (b"", True)
