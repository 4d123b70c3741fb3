"""Extended mode (docs/reference/protocol.md part 2): negotiation, credit, deferred requests, typed ends, faults."""

from typing import Any

import pytest

from tests.vshd.joined import Joined
from vshd.wire import messages, state
from vshd.wire.client import STUB_ARGV, STUB_USER, ClientConnection
from vshd.wire.connection import MAX_DATA, REQUEST_MAX, WINDOW, default_limits
from vshd.wire.errors import LocalProtocolError
from vshd.wire.frames import encode_data_head, encode_frame
from vshd.wire.messages import (
    CreditMessage,
    DataMessage,
    Extended,
    Failure,
    GuestMessage,
    HostMessage,
    SetupConnectionRequest,
    SetupConnectionResponse,
)

STDIN, STDOUT, STDERR = 1, 2, 3


def limits(**fields: Any) -> Extended:
    made = default_limits()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def frame(message: GuestMessage | HostMessage) -> bytes:
    return encode_frame(message.encode(), 1 << 20)


# 2.1 Negotiation


def test_two_peers_of_ours_recognise_each_other() -> None:
    joined = Joined().establish(pid=5)
    assert joined.last("client") == ("Established", {"pid": 5, "is_extended": True})
    assert joined.client.is_extended
    assert joined.server.is_extended
    assert joined.client.max_data == joined.server.max_data == MAX_DATA


@pytest.mark.parametrize("chunk", [1, 13])
def test_negotiation_survives_any_split(chunk: int) -> None:
    joined = Joined(chunk=chunk).establish(argv=[b"x" * 6000])
    joined.server.send_data(STDOUT, b"o" * 9000)
    joined.pump()
    assert joined.data("client", STDOUT) == b"o" * 9000


@pytest.mark.parametrize(
    ("announced", "max_data", "window"),
    [
        ({"max_data": 0, "window": 0}, 4000, 4000),
        ({"max_data": 5000, "window": 6000}, 5000, 6000),
        ({"max_data": 2**32 - 1, "window": 2**32 - 1}, 1 << 20, 1 << 24),
    ],
)
def test_announcements_are_clamped(announced: dict[str, int], max_data: int, window: int) -> None:
    joined = Joined(client=limits(**announced)).establish()
    assert joined.server.max_data == max_data
    assert joined.server.send_room(STDOUT) == window
    assert joined.client.send_room(STDIN) == WINDOW


def test_answer_speaks_no_higher_version_than_ours() -> None:
    joined = Joined(client=limits(version=9, features=0xFF)).establish()
    assert joined.client.peer
    assert joined.client.peer.version == 1
    assert joined.client.peer.features == 0


@pytest.mark.parametrize("version", [0])
def test_version_0_is_no_offer(version: int) -> None:
    joined = Joined(client=limits(version=version)).establish()
    assert not joined.server.is_extended
    assert not joined.client.is_extended


def test_answer_of_an_unknown_version_is_legacy_mode() -> None:
    client = ClientConnection(default_limits())
    client.send_setup(SetupConnectionRequest(argv=[b"true"]))
    answer = SetupConnectionResponse(messages.READY, b"", 1, Extended(version=2))
    client.receive_data(encode_frame(answer.encode(), 4096))
    assert not client.is_extended


# 2.3 Requests of any size


def test_long_request_arrives_whole() -> None:
    argv = [b"printf", b"%s", *(b"a" * 1000 for _ in range(1048))]
    env = {b"LONG": b"v" * 100_000}
    joined = Joined()
    request = joined.open(argv=argv, env=env, cwd=b"/tmp", user=b"me", nopty=True)
    assert (request.argv, request.env, request.cwd, request.user) == (argv, env, b"/tmp", b"me")
    joined.server.accept(9)
    joined.pump()
    assert joined.last("client") == ("Established", {"pid": 9, "is_extended": True})


def test_stub_is_what_every_legacy_server_refuses() -> None:
    client = ClientConnection(default_limits())
    client.send_setup(SetupConnectionRequest(target=b"/vm_shell", argv=[b"x" * 5000]))
    sent = client.output.take()
    assert len(sent) <= 4096 + 4
    stub = SetupConnectionRequest()
    stub.merge(sent[4:])
    # Section 1.4: only this target makes every server look at the user, and no user has a colon.
    assert (stub.target, stub.user, stub.argv, stub.nopty) == (b"/vm_shell", STUB_USER, [STUB_ARGV], True)
    assert b":" in stub.user
    assert stub.extended
    assert stub.extended.request_size > 5000


def test_request_is_deferred_only_when_it_must_be() -> None:
    for size in range(3900, 4200):
        client = ClientConnection(default_limits())
        request = SetupConnectionRequest(argv=[b"x" * size])
        client.send_setup(request)
        sent = client.output.take()
        assert len(sent) <= 4100
        assert (STUB_USER in sent) == (len(request.encode()) > 4096)


def test_legacy_refusal_of_the_stub_says_that_it_is_too_long() -> None:
    joined = Joined(server=None)
    joined.offer(argv=[b"x" * 5000])
    joined.server.refuse("could not find user: :vsh-extended", Failure(messages.BAD_USER))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["is_too_long"]) == ("Refused", True)


def test_legacy_server_that_takes_the_stub_is_a_fault() -> None:
    joined = Joined(server=None)
    joined.offer(argv=[b"x" * 5000])
    joined.server.accept(1)
    joined.pump()
    assert joined.last("client")[0] == "Broken"


def test_request_over_the_servers_limit_is_refused_by_type() -> None:
    joined = Joined()
    joined.offer(argv=[b"x" * 1000] * (REQUEST_MAX // 1000 + 1))
    name, fields = joined.last("client")
    assert (name, fields["failure"].kind, fields["is_too_long"]) == ("Refused", messages.TOO_LONG, False)
    assert joined.names("server") == ["Failed"]


def test_deferred_request_can_be_refused() -> None:
    joined = Joined()
    joined.offer(argv=[b"nope", b"x" * 5000])
    joined.server.refuse("nope: command not found", Failure(messages.NOT_FOUND, 2, b"nope"))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["failure"].kind, fields["failure"].error, fields["failure"].subject) == (
        "Refused",
        messages.NOT_FOUND,
        2,
        b"nope",
    )


def defer(size: int = 10) -> Joined:
    """A server that waits for a deferred request of `size` bytes."""
    joined = Joined()
    joined.offer(argv=[b"x" * 5000])
    server = Joined()
    setup = SetupConnectionRequest(target=b"/vm_shell", user=STUB_USER, extended=limits(request_size=size))
    server.feed(server.server, encode_frame(setup.encode(), 4096))
    assert server.server.state == state.DEFERRED
    return server


def test_more_of_a_request_than_announced_is_a_fault() -> None:
    joined = defer(10)
    joined.feed(joined.server, frame(GuestMessage(messages.REQUEST_CHUNK, b"x" * 11)))
    assert joined.last("server")[0] == "Broken"


def test_deferred_request_that_is_nonsense_is_a_fault() -> None:
    joined = defer(10)
    joined.feed(joined.server, frame(GuestMessage(messages.REQUEST_CHUNK, b"\xff" * 10)))
    assert joined.last("server")[0] == "Broken"


def test_other_words_before_the_session_started_are_a_fault() -> None:
    joined = defer()
    joined.feed(joined.server, frame(GuestMessage(messages.ALIVE, True)))
    joined.feed(joined.server, frame(GuestMessage(messages.HOLD, True)))
    assert joined.names("server") == []
    joined.feed(joined.server, frame(GuestMessage(messages.DATA_MESSAGE, DataMessage(1, b"x"))))
    assert joined.last("server")[0] == "Broken"


def test_part_of_a_request_in_a_session_is_a_fault() -> None:
    joined = Joined().establish()
    joined.feed(joined.server, frame(GuestMessage(messages.REQUEST_CHUNK, b"x")))
    assert joined.last("server")[0] == "Broken"


# 2.4 Credit


def test_credit_bounds_what_is_under_way() -> None:
    joined = Joined(client=limits(window=10_000)).establish()
    joined.consumes = False
    joined.server.send_data(STDOUT, b"o" * 10_000)
    assert joined.server.send_room(STDOUT) == 0
    with pytest.raises(LocalProtocolError):
        joined.server.send_data(STDOUT, b"o")
    # The other stream has a window of its own, and ends and signals need none.
    joined.server.send_data(STDERR, b"e" * 10_000)
    joined.server.send_end(STDOUT)
    joined.pump()
    assert joined.data("client", STDOUT) == b"o" * 10_000
    assert joined.data("client", STDERR) == b"e" * 10_000
    assert joined.client.send_signal(9)


def test_credit_returns_as_data_is_consumed() -> None:
    joined = Joined(client=limits(window=10_000)).establish()
    joined.consumes = False
    joined.server.send_data(STDOUT, b"o" * 10_000)
    joined.pump()
    joined.client.consumed(STDOUT, 4999)
    assert joined.client.output.size == 0  # not worth a frame yet
    joined.client.consumed(STDOUT, 1)
    joined.pump()
    assert joined.server.send_room(STDOUT) == 5000
    joined.client.consumed(STDOUT, 5000)
    joined.pump()
    assert joined.server.send_room(STDOUT) == 10_000


def test_credit_flows_for_as_long_as_data_does() -> None:
    joined = Joined(client=limits(window=5000, max_data=4000), server=limits(window=5000, max_data=4000)).establish()
    sent = received = 0
    for _ in range(200):
        room = min(joined.client.send_room(STDIN), 3333)
        joined.client.send_data(STDIN, b"i" * room)
        sent += room
        joined.pump()
    received = len(joined.data("server", STDIN))
    assert sent == received > 200 * 1000


def test_data_without_credit_is_a_fault() -> None:
    joined = Joined(server=limits(window=5000)).establish()
    joined.consumes = False
    joined.feed(joined.server, encode_data_head(STDIN, 5001) + b"x" * 5001)
    assert joined.last("server")[0] == "Broken"


def test_credit_over_31_bits_is_a_fault() -> None:
    joined = Joined().establish()
    joined.feed(joined.server, frame(GuestMessage(messages.CREDIT, CreditMessage(STDOUT, 2**31 - 1))))
    assert joined.last("server")[0] == "Broken"


@pytest.mark.parametrize("stream", [0, 1, 4, 99])
def test_credit_for_a_stream_of_the_other_way_is_a_fault(stream: int) -> None:
    joined = Joined().establish()
    joined.feed(joined.server, frame(GuestMessage(messages.CREDIT, CreditMessage(stream, 1))))
    assert joined.last("server")[0] == "Broken"


def test_frames_are_as_large_as_the_peer_takes() -> None:
    joined = Joined(client=limits(max_data=10_000)).establish()
    joined.server.send_data(STDOUT, b"o" * 25_000)
    joined.pump()
    sizes = [25_000 - 2 * 10_000, 10_000]
    assert joined.data("client", STDOUT) == b"o" * 25_000
    assert sorted(sizes) == [5_000, 10_000]
    joined.feed(joined.client, (10_097).to_bytes(4, "little"))
    assert joined.last("client")[0] == "Broken"


# 2.5 Streams nobody reads


def test_closed_stdin_is_told_and_late_data_dropped() -> None:
    joined = Joined().establish()
    joined.client.send_data(STDIN, b"late")
    joined.server.close_stream(STDIN)
    joined.pump()
    assert joined.last("client") == ("StreamClosed", {"stream": STDIN})
    assert joined.client.send_room(STDIN) == 0
    assert joined.data("server", STDIN) == b""
    joined.client.send_end(STDIN)
    assert joined.client.output.size == 0


def test_closed_stdout_is_told() -> None:
    joined = Joined().establish()
    joined.client.close_stream(STDOUT)
    joined.client.close_stream(STDOUT)
    joined.pump()
    assert joined.names("server").count("StreamClosed") == 1
    assert joined.server.send_room(STDOUT) == 0
    joined.server.send_end(STDERR)
    joined.server.send_exit(141, signal=13)
    joined.pump()
    assert joined.last("client")[0] == "Exited"


# 2.6 The end


def test_exit_tells_a_signal_from_a_code() -> None:
    for code, signal, dumped in ((9, 0, False), (9, 9, False), (11, 11, True)):
        joined = Joined().establish()
        joined.server.send_end(STDOUT)
        joined.server.send_end(STDERR)
        joined.server.send_exit(code, signal=signal, core_dumped=dumped)
        joined.pump()
        assert joined.last("client") == ("Exited", {"code": code, "signal": signal, "core_dumped": dumped})


def test_exit_before_the_end_of_output_is_a_fault() -> None:
    joined = Joined().establish()
    joined.server.send_end(STDOUT)
    joined.server.send_exit(0)
    joined.pump()
    assert joined.last("client")[0] == "Broken"


def test_failure_in_a_session_is_typed() -> None:
    joined = Joined().establish()
    joined.server.send_failure("vshd is shutting down", Failure(messages.SHUTDOWN))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["failure"].kind) == ("Failed", messages.SHUTDOWN)


def test_fault_is_answered_by_the_server() -> None:
    joined = Joined().establish()
    joined.feed(joined.server, b"\xff\xff\xff\xff")
    assert joined.last("server")[0] == "Broken"
    joined.server.send_failure("too large", Failure(messages.PROTOCOL))
    joined.pump()
    name, fields = joined.last("client")
    assert (name, fields["failure"].kind) == ("Failed", messages.PROTOCOL)


# 2.2, 2.7 Words


@pytest.mark.parametrize("number", [1, 2, 9, 10, 12, 19, 28, 34, 64])
def test_any_signal_has_a_word(number: int) -> None:
    joined = Joined().establish()
    assert joined.client.send_signal(number)
    joined.pump()
    assert joined.last("server") == ("Signalled", {"number": number})


@pytest.mark.parametrize("number", [0, 65, 2**32 - 1])
def test_signal_that_does_not_exist_is_a_fault(number: int) -> None:
    joined = Joined().establish()
    assert not joined.client.send_signal(number)
    joined.feed(joined.server, frame(GuestMessage(messages.SIGNAL_NUMBER, number)))
    assert joined.last("server")[0] == "Broken"


def test_hold_and_alive_are_heard() -> None:
    joined = Joined().establish()
    joined.client.send_hold()
    joined.client.send_alive()
    joined.server.send_alive()
    joined.pump()
    assert joined.names("server") == ["RequestReceived", "Held"]
    assert joined.names("client") == ["Established"]


@pytest.mark.parametrize("side", ["client", "server"])
def test_unknown_words_are_skipped(side: str) -> None:
    joined = Joined().establish()
    joined.feed(getattr(joined, side), bytes.fromhex("04000000 9abb2900".replace(" ", "")))
    joined.feed(getattr(joined, side), bytes.fromhex("00000000"))
    assert "Broken" not in joined.names(side)


# 2.8 Faults


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("server", GuestMessage(messages.DATA_MESSAGE, DataMessage(STDOUT, b"x"))),
        ("server", GuestMessage(messages.DATA_MESSAGE, DataMessage(0, b""))),
        ("server", GuestMessage(messages.CLOSE_STREAM, STDIN)),
        ("client", HostMessage(messages.DATA_MESSAGE, DataMessage(STDIN, b"x"))),
        ("client", HostMessage(messages.DATA_MESSAGE, DataMessage(9, b""))),
        ("client", HostMessage(messages.CLOSE_STREAM, STDOUT)),
        ("client", HostMessage(messages.STARTED, SetupConnectionResponse(messages.READY))),
    ],
)
def test_fault_breaks_the_connection(side: str, message: GuestMessage | HostMessage) -> None:
    joined = Joined().establish()
    joined.feed(getattr(joined, side), frame(message))
    assert joined.last(side)[0] == "Broken"


@pytest.mark.parametrize("side", ["client", "server"])
def test_data_after_the_end_of_a_stream_is_a_fault(side: str) -> None:
    joined = Joined().establish()
    stream = STDOUT if side == "client" else STDIN
    end = frame(HostMessage(messages.DATA_MESSAGE, DataMessage(stream)))
    for late in (encode_data_head(stream, 1) + b"x", end):
        joined = Joined().establish()
        joined.feed(getattr(joined, side), end)
        joined.feed(getattr(joined, side), late)
        assert joined.last(side)[0] == "Broken"
