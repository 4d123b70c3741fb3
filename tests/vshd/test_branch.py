"""The branch of a forward on the wire (docs/reference/protocol.md 3.4): both sides of it, joined in memory."""

import pytest

from vshd.wire import messages
from vshd.wire.branch import (
    EARLY_MAX,
    GO,
    SECRET_SIZE,
    TOKEN_SIZE,
    ClientBranch,
    ServerBranch,
    encode_acceptance,
    encode_refusal,
)
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.messages import Failure

TOKEN = bytes(range(TOKEN_SIZE))


def prove() -> tuple[ClientBranch, ServerBranch]:
    client, server = ClientBranch(TOKEN), ServerBranch(TOKEN)
    assert client.receive_proof(server.receive_data(client.secret))
    assert server.is_proven
    return client, server


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_branch_is_asked_once_both_have_shown_their_secrets(size: int) -> None:
    client, server = ClientBranch(TOKEN), ServerBranch(TOKEN)
    said = b""
    talk = client.secret + GO + b"first words"
    while talk:
        taken = min(size, server.wanted)
        said += server.receive_data(talk[:taken])
        talk = talk[taken:]
        assert server.is_proven == bool(said)
    assert said == TOKEN[SECRET_SIZE:]
    assert (server.is_asked, server.rest) == (True, b"first words")
    for index in range(SECRET_SIZE):
        assert client.receive_proof(said[index : index + 1]) == (index == SECRET_SIZE - 1)


def test_server_asks_strangers_for_no_more_than_the_secret() -> None:
    server = ServerBranch(TOKEN)
    assert server.wanted == SECRET_SIZE
    server.receive_data(TOKEN[:10])
    assert server.wanted == SECRET_SIZE - 10
    server.receive_data(TOKEN[10:SECRET_SIZE])
    assert server.wanted == EARLY_MAX


@pytest.mark.parametrize("index", [0, SECRET_SIZE - 1])
def test_wrong_secret_is_a_fault_on_either_side(index: int) -> None:
    wrong = bytearray(TOKEN)
    wrong[index] ^= 1
    wrong[SECRET_SIZE + index] ^= 1
    with pytest.raises(RemoteProtocolError, match="without the client's secret"):
        ServerBranch(TOKEN).receive_data(bytes(wrong[:SECRET_SIZE]))
    with pytest.raises(RemoteProtocolError, match="without its secret"):
        ClientBranch(TOKEN).receive_proof(bytes(wrong[SECRET_SIZE:]))


def test_secret_of_the_client_proves_no_server() -> None:
    """A program that sends back what it got is no server."""
    client = ClientBranch(TOKEN)
    with pytest.raises(RemoteProtocolError):
        client.receive_proof(client.secret)


def test_anything_but_go_is_a_fault() -> None:
    _, server = prove()
    with pytest.raises(RemoteProtocolError, match="anything but GO"):
        server.receive_data(b"\x02word")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_response_may_come_in_pieces_and_with_bytes_behind_it(size: int) -> None:
    client, _ = prove()
    data = encode_acceptance() + b"raw \xff"
    response = None
    for start in range(0, len(data), size):
        if response is None:
            response = client.receive_data(data[start : start + size])
            rest = data[start + size :]
    assert response is not None
    assert response.status == messages.READY
    assert client.rest + rest == b"raw \xff"


def test_refusal_is_typed() -> None:
    client, _ = prove()
    response = client.receive_data(encode_refusal(b"cannot connect", Failure(messages.UNREACHABLE, 111)))
    assert response is not None
    assert response.extended is not None
    assert response.extended.failure is not None
    assert (response.status, response.description) == (messages.FAILED, b"cannot connect")
    assert (response.extended.failure.kind, response.extended.failure.error) == (messages.UNREACHABLE, 111)


def test_response_that_is_too_long_or_none_is_a_fault() -> None:
    client, _ = prove()
    with pytest.raises(RemoteProtocolError, match="more than 4096 bytes"):
        client.receive_data((4097).to_bytes(4, "little"))
    client, _ = prove()
    with pytest.raises(RemoteProtocolError):
        client.receive_data((2).to_bytes(4, "little") + b"\xff\xff")
