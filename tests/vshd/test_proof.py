"""The token's proof (docs/reference/protocol.md 2.9): both sides joined, and every way to get by without the token."""

import hmac
import inspect
from typing import Any

import pytest

from tests.vshd.joined import Joined
from vshd.wire import messages, proof, state
from vshd.wire.client import STUB_ARGV, ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.errors import LocalProtocolError, TokenError
from vshd.wire.events import Broken, Distrusted, Established, Event, Refused, RequestReceived
from vshd.wire.frames import LEGACY_MAX_PAYLOAD, encode_frame
from vshd.wire.messages import Failure, GuestMessage, HostMessage, SetupConnectionRequest, SetupConnectionResponse
from vshd.wire.proof import CLIENT, NONCE_BYTES, SERVER, TOKEN_BYTES, Proof, hmac_sha256
from vshd.wire.proto3 import Message
from vshd.wire.server import ServerConnection

TOKEN = bytes(range(TOKEN_BYTES))
OTHER = bytes(reversed(TOKEN))
NONCES = (b"c" * NONCE_BYTES, b"s" * NONCE_BYTES)
SECRET = b"the-secret-command"


def join(client: bytes | None = TOKEN, server: bytes | None = TOKEN, **options: Any) -> Joined:
    """A client and a server with these tokens, None for none."""
    proofs = (
        None if client is None else Proof(CLIENT, client, NONCES[0]),
        None if server is None else Proof(SERVER, server, NONCES[1]),
    )
    return Joined(proofs=proofs, **options)


def frames(data: bytes) -> list[bytes]:
    """The payloads in `data`."""
    found = []
    while data:
        size = int.from_bytes(data[:4], "little")
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def frame(
    member: int, value: Message | int | bytes, kind: type[GuestMessage] | type[HostMessage] = GuestMessage
) -> bytes:
    return encode_frame(kind(member, value).encode(), 1 << 20)


def open_client(token: bytes = TOKEN, **fields: Any) -> tuple[ClientConnection, bytes]:
    """A client that has sent its stub, and the stub."""
    client = ClientConnection(default_limits(), Proof(CLIENT, token, NONCES[0]))
    client.send_setup(SetupConnectionRequest(argv=[SECRET], **fields))
    return client, client.output.take()


def open_server(stub: bytes, nonce: bytes = NONCES[1], **options: Any) -> tuple[ServerConnection, list[Event], bytes]:
    """A server with the token that has answered `stub`, and its events and answer."""
    server = ServerConnection(default_limits(), Proof(SERVER, TOKEN, nonce), **options)
    return server, server.receive_data(stub), server.output.take()


def find_failure(data: bytes, *, is_deferred: bool = True) -> int:
    """What a server's last frame says is wrong."""
    payload = frames(data)[-1]
    if is_deferred:
        message = HostMessage()
        message.merge(payload)
        assert message.member == messages.STARTED
        assert isinstance(message.value, SetupConnectionResponse)
        response = message.value
    else:
        response = SetupConnectionResponse()
        response.merge(payload)
    assert response.status == messages.FAILED
    assert response.extended
    assert response.extended.failure
    return response.extended.failure.kind


# The way in.


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("size", [1, 100_000])
def test_both_sides_prove_the_token_before_the_request(chunk: int | None, size: int) -> None:
    joined = join(chunk=chunk)
    request = joined.open(argv=[b"x" * size], env={b"A": b"b"})
    assert request.argv == [b"x" * size]
    assert request.env == {b"A": b"b"}
    joined.server.accept(42)
    joined.pump()
    assert joined.last("client")[0] == "Established"
    assert joined.server.state == joined.client.state == state.RUNNING


def test_token_and_request_are_in_nothing_that_an_unproven_server_sees() -> None:
    client, stub = open_client(env={b"KEY": SECRET})
    assert SECRET not in stub
    request = SetupConnectionRequest()
    request.merge(frames(stub)[0])
    assert request.argv == [STUB_ARGV]
    joined = join()
    joined.establish(argv=[SECRET])
    for data in (joined.to_client, joined.to_server):
        assert TOKEN not in data
        assert TOKEN.hex().encode() not in data
    assert client.state == state.AWAITING_RESPONSE


def test_empty_request_is_proven_too() -> None:
    joined = Joined(proofs=(Proof(CLIENT, TOKEN, NONCES[0]), Proof(SERVER, TOKEN, NONCES[1])))
    joined.client.send_setup(SetupConnectionRequest())
    joined.pump()
    assert joined.names("server") == ["RequestReceived"]


def test_session_after_the_proof_is_like_every_other() -> None:
    joined = join()
    joined.establish()
    joined.client.send_data(messages.STDIN, b"x" * 200_000)
    joined.pump()
    assert joined.data("server", messages.STDIN) == b"x" * 200_000


# The server's guard.


@pytest.mark.parametrize("limits", [None, default_limits()], ids=["legacy", "extended"])
def test_client_without_a_token_is_refused(limits: messages.Extended | None) -> None:
    joined = join(client=None)
    joined.client.limits = limits
    joined.offer(argv=[SECRET])
    assert joined.names("server") == ["Distrusted"]
    name, fields = joined.last("client")
    assert name == "Refused"
    assert "demands its token" in fields["description"]
    assert joined.server.state == state.OVER
    if limits is not None:
        assert fields["failure"].kind == messages.NOT_TRUSTED


def test_deferred_request_without_a_nonce_is_refused() -> None:
    joined = join(client=None)
    joined.offer(argv=[b"x" * 10_000])
    assert joined.names("server") == ["Distrusted"]
    assert joined.last("client")[1]["failure"].kind == messages.NOT_TRUSTED


def test_legacy_client_is_served_where_it_is_allowed_and_no_other() -> None:
    client = ClientConnection(None)
    client.send_setup(SetupConnectionRequest(argv=[b"true"]))
    server, events, _ = open_server(client.output.take(), allow_legacy_clients=True)
    assert isinstance(events[0], RequestReceived)
    server.accept(5)
    assert isinstance(client.receive_data(server.output.take())[0], Established)
    joined = join(client=None, allow_legacy_clients=True)
    joined.offer()
    assert joined.names("server") == ["Distrusted"]


@pytest.mark.parametrize(
    "claim",
    [b"", b"\0", bytes(32), bytes(31), bytes(33), b"x" * 4000, NONCES[1], TOKEN],
    ids=["empty", "one", "zeros", "short", "long", "4000", "nonce", "token-of-another"],
)
def test_guessed_proof_is_refused(claim: bytes) -> None:
    client, stub = open_client()
    server, _, _ = open_server(stub)
    request = SetupConnectionRequest(argv=[SECRET]).encode()
    events = server.receive_data(frame(messages.PROOF, claim) + frame(messages.REQUEST_CHUNK, request))
    assert [type(event) for event in events] == [Distrusted]
    assert server.state == state.OVER
    assert find_failure(server.output.take()) == messages.NOT_TRUSTED
    assert client.state == state.AWAITING_RESPONSE


def test_every_bit_of_the_proof_counts() -> None:
    for bit in range(256):
        client, stub = open_client()
        server, _, answer = open_server(stub)
        client.receive_data(answer)
        right = frames(client.output.take())[0]
        message = GuestMessage()
        message.merge(right)
        assert isinstance(message.value, bytes)
        wrong = bytearray(message.value)
        wrong[bit // 8] ^= 1 << bit % 8
        assert isinstance(server.receive_data(frame(messages.PROOF, bytes(wrong)))[0], Distrusted)


def test_replayed_proof_is_refused() -> None:
    client, stub = open_client()
    _, _, answer = open_server(stub)
    client.receive_data(answer)
    recorded = client.output.take()
    server, _, _ = open_server(stub, nonce=b"t" * NONCE_BYTES)
    events = server.receive_data(recorded)
    assert [type(event) for event in events] == [Distrusted]


def test_servers_proof_handed_back_is_refused() -> None:
    _, stub = open_client()
    server, _, answer = open_server(stub)
    message = HostMessage()
    message.merge(frames(answer)[1])
    assert message.member == messages.PROOF
    assert isinstance(message.value, bytes)
    events = server.receive_data(frame(messages.PROOF, message.value))
    assert [type(event) for event in events] == [Distrusted]


def test_proof_of_another_token_is_refused() -> None:
    joined = join(client=OTHER)
    joined.offer(argv=[SECRET])
    assert joined.names("client") == ["Distrusted"]
    assert joined.names("server") == []
    assert SECRET not in joined.to_server


@pytest.mark.parametrize(
    "early",
    [
        frame(messages.REQUEST_CHUNK, b"x"),
        frame(messages.SIGNAL, 9),
        frame(messages.DATA_MESSAGE, messages.DataMessage(messages.STDIN, b"x")),
        frame(messages.CREDIT, messages.CreditMessage(messages.STDOUT, 1)),
    ],
    ids=["request", "signal", "data", "credit"],
)
def test_anything_before_the_proof_is_a_fault(early: bytes) -> None:
    _, stub = open_client()
    server, _, _ = open_server(stub)
    events = server.receive_data(early)
    assert [type(event) for event in events] == [Broken]
    server.send_failure("x", Failure(messages.PROTOCOL))
    assert server.state == state.OVER


def test_alive_and_hold_may_come_before_the_proof() -> None:
    client, stub = open_client()
    server, _, answer = open_server(stub)
    client.receive_data(answer)
    words = frame(messages.ALIVE, True) + frame(messages.HOLD, True)
    events = server.receive_data(words + client.output.take())
    assert [type(event) for event in events] == [RequestReceived]


def test_second_proof_is_a_fault() -> None:
    client, stub = open_client()
    server, _, answer = open_server(stub)
    client.receive_data(answer)
    proof_frame = encode_frame(frames(client.output.take())[0], 4096)
    assert server.receive_data(proof_frame) == []
    assert isinstance(server.receive_data(proof_frame)[0], Broken)


def test_unproven_client_gets_no_large_frames() -> None:
    _, stub = open_client()
    server, _, _ = open_server(stub)
    events = server.receive_data((LEGACY_MAX_PAYLOAD + 1).to_bytes(4, "little"))
    assert [type(event) for event in events] == [Broken]


@pytest.mark.parametrize("size", [1, 31, 33, 500])
def test_nonce_of_another_size_is_a_fault(size: int) -> None:
    offer = default_limits()
    offer.nonce, offer.request_size = b"n" * size, 10
    stub = encode_frame(SetupConnectionRequest(extended=offer).encode(), 4096)
    server, events, _ = open_server(stub)
    (event,) = events
    assert isinstance(event, Broken)
    server.send_failure(event.reason, Failure(messages.PROTOCOL))
    assert find_failure(server.output.take(), is_deferred=False) == messages.PROTOCOL


def test_nonce_without_a_deferred_request_is_a_fault() -> None:
    offer = default_limits()
    offer.nonce = NONCES[0]
    stub = encode_frame(SetupConnectionRequest(argv=[b"x"], extended=offer).encode(), 4096)
    _, events, _ = open_server(stub)
    assert [type(event) for event in events] == [Broken]


def test_request_that_is_too_large_is_refused_before_any_proof() -> None:
    offer = default_limits()
    offer.nonce, offer.request_size = NONCES[0], 1 << 30
    stub = encode_frame(SetupConnectionRequest(extended=offer).encode(), 4096)
    server, _, answer = open_server(stub)
    assert find_failure(answer, is_deferred=False) == messages.TOO_LONG
    assert server.state == state.OVER


# The client's guard.


@pytest.mark.parametrize("limits", [None, default_limits()], ids=["legacy", "extended"])
def test_server_without_the_token_gets_nothing_but_the_stub(limits: messages.Extended | None) -> None:
    joined = join(server=None)
    joined.server.limits = limits
    joined.client.send_setup(SetupConnectionRequest(argv=[SECRET]))
    stub = joined.client.output.take()
    joined.feed(joined.server, stub)
    if limits is None:
        # It takes the stub for a request, and does not find its user.
        joined.server.refuse("could not find user", Failure(messages.BAD_USER))
    joined.feed(joined.client, joined.server.output.take())
    name, fields = joined.last("client")
    assert name == "Distrusted"
    assert fields["said"] == ("could not find user" if limits is None else "")
    assert not joined.client.output.size
    assert joined.client.is_finished


@pytest.mark.parametrize("claim", [b"", bytes(32), bytes(31), NONCES[0], b"x" * 4000])
def test_server_that_guesses_gets_nothing_but_the_stub(claim: bytes) -> None:
    client, stub = open_client()
    _, _, answer = open_server(stub)
    events = client.receive_data(encode_frame(frames(answer)[0], 4096) + frame(messages.PROOF, claim, HostMessage))
    assert [type(event) for event in events] == [Distrusted]
    assert not client.output.size


def test_server_that_replays_gets_nothing_but_the_stub() -> None:
    _, stub = open_client()
    _, _, recorded = open_server(stub)
    client = ClientConnection(default_limits(), Proof(CLIENT, TOKEN, b"d" * NONCE_BYTES))
    client.send_setup(SetupConnectionRequest(argv=[SECRET]))
    client.output.take()
    assert [type(event) for event in client.receive_data(recorded)] == [Distrusted]
    assert not client.output.size


def test_two_clients_cannot_be_played_against_each_other() -> None:
    """A fake server that knows another client's nonce, and hopes to be answered by it."""
    client, stub = open_client()
    offer = SetupConnectionRequest()
    offer.merge(frames(stub)[0])
    answer = default_limits()
    assert offer.extended
    answer.nonce = offer.extended.nonce
    response = SetupConnectionResponse(messages.READY, b"vsh ready", extended=answer)
    assert client.receive_data(encode_frame(response.encode(), 4096)) == []
    assert not client.output.size
    assert client.state == state.AWAITING_PROOF


@pytest.mark.parametrize("field", ["version", "features", "max_data", "window", "silence_ms", "request_size"])
@pytest.mark.parametrize("direction", ["offer", "answer"])
def test_offer_or_answer_changed_on_the_way_is_noticed(direction: str, field: str) -> None:
    """Whoever sits between the two cannot take a feature away from them."""
    joined = join()
    joined.client.send_setup(SetupConnectionRequest(argv=[SECRET]))
    stub = joined.client.output.take()
    if direction == "offer":
        request = SetupConnectionRequest()
        request.merge(frames(stub)[0])
        setattr(request.extended, field, getattr(request.extended, field) + 1)
        stub = encode_frame(request.encode(), 4096)
    joined.feed(joined.server, stub)
    answer, claim = frames(joined.server.output.take())
    if direction == "answer":
        response = SetupConnectionResponse()
        response.merge(answer)
        setattr(response.extended, field, max(0, getattr(response.extended, field) - 1) or 1)
        answer = response.encode()
        if field in ("version", "request_size"):
            # These are 1 already, or mean nothing here; any other byte will do.
            answer += b"\x78\x01"
    joined.feed(joined.client, encode_frame(answer, 4096) + encode_frame(claim, 4096))
    assert joined.names("client") == ["Distrusted"]
    assert not joined.client.output.size


@pytest.mark.parametrize(
    "instead",
    [
        frame(messages.STARTED, SetupConnectionResponse(messages.READY, b"", 5), HostMessage),
        frame(messages.DATA_MESSAGE, messages.DataMessage(messages.STDOUT, b"x"), HostMessage),
        frame(messages.CLOSE_STREAM, messages.STDIN, HostMessage),
        (1 << 20).to_bytes(4, "little"),
    ],
    ids=["started", "data", "close", "large"],
)
def test_anything_in_place_of_the_servers_proof_is_a_fault(instead: bytes) -> None:
    client, stub = open_client()
    _, _, answer = open_server(stub)
    events = client.receive_data(encode_frame(frames(answer)[0], 4096) + instead)
    assert [type(event) for event in events] == [Broken]
    assert not client.output.size


def test_servers_nonce_of_another_size_is_a_fault() -> None:
    client, _ = open_client()
    answer = default_limits()
    answer.nonce = b"n"
    response = SetupConnectionResponse(messages.READY, b"vsh ready", extended=answer)
    events = client.receive_data(encode_frame(response.encode(), 4096))
    assert [type(event) for event in events] == [Broken]


def test_proof_in_a_running_session_is_a_fault_on_both_sides() -> None:
    joined = Joined().establish()
    assert isinstance(joined.server.receive_data(frame(messages.PROOF, b"x"))[0], Broken)
    joined = Joined().establish()
    assert isinstance(joined.client.receive_data(frame(messages.PROOF, b"x", HostMessage))[0], Broken)


def test_refusal_of_a_server_that_knows_tokens_is_told() -> None:
    client, _ = open_client()
    answer = default_limits()
    answer.failure = Failure(messages.LIMIT)
    response = SetupConnectionResponse(messages.FAILED, b"too many", extended=answer)
    (event,) = client.receive_data(encode_frame(response.encode(), 4096))
    assert isinstance(event, Refused)
    assert event.failure
    assert event.failure.kind == messages.LIMIT


def test_legacy_mode_cannot_prove() -> None:
    client = ClientConnection(None, Proof(CLIENT, TOKEN, NONCES[0]))
    with pytest.raises(LocalProtocolError):
        client.send_setup(SetupConnectionRequest(argv=[b"true"]))
    assert not client.output.size


# The arithmetic.


@pytest.mark.parametrize(
    ("key", "message", "digest"),
    [
        # RFC 4231, test cases 1 to 3.
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
    ],
)
def test_hmac_is_that_of_the_rfc(key: bytes, message: bytes, digest: str) -> None:
    assert hmac_sha256(key, message).hex() == digest


def test_hmac_is_the_librarys() -> None:
    for size in (0, 1, 55, 56, 63, 64, 65, 1000):
        assert hmac_sha256(TOKEN, b"m" * size) == hmac.digest(TOKEN, b"m" * size, "sha256")
    with pytest.raises(TokenError):
        hmac_sha256(bytes(65), b"")


def test_proofs_are_compared_in_constant_time() -> None:
    assert "compare_digest(" in inspect.getsource(Proof.is_peers)
    compare = vars(proof)["compare_digest"]
    assert (compare.__module__, compare.__name__) == ("_operator", "_compare_digest")


def test_payloads_cannot_be_shifted_within_the_transcript() -> None:
    one, two = Proof(CLIENT, TOKEN, NONCES[0]), Proof(CLIENT, TOKEN, NONCES[0])
    one.bind(b"ab")
    one.bind(b"c")
    two.bind(b"a")
    two.bind(b"bc")
    assert one.make() != two.make()


# The text.


def test_token_text_survives_the_round() -> None:
    text = proof.render_token(TOKEN)
    assert text == b"vmkit.token:" + TOKEN.hex().encode()
    assert proof.parse_token(text) == proof.parse_token(text + b"\n") == TOKEN


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        TOKEN.hex().encode(),
        b"vmkit.token:",
        b"vmkit.token:" + b"0" * 63,
        b"vmkit.token:" + b"0" * 65,
        b"vmkit.token:" + b"g" * 64,
        b"vmkit.token:" + b"A" * 64,
        b"vmkit.token:" + b"0" * 63 + b" ",
        b"vmkit.token:" + b"0" * 64 + b"\n\n",
        b"vmkit.token:" + b"\xff" * 64,
        b"VMKIT.TOKEN:" + b"0" * 64,
    ],
)
def test_what_is_no_token_is_refused_and_not_quoted(text: bytes) -> None:
    with pytest.raises(TokenError) as caught:
        proof.parse_token(text)
    assert "000" not in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 32), (31, 32), (33, 32), (32, 0), (32, 31)])
def test_token_and_nonce_have_one_size(sizes: tuple[int, int]) -> None:
    with pytest.raises(TokenError):
        Proof(CLIENT, bytes(sizes[0]), bytes(sizes[1]))
