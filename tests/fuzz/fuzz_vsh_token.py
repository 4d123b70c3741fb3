"""Fuzzes what stands between a stranger and a machine with a token: both sides' handshakes, and the token's parsers.

Whatever is damaged on the way, no server without the token may learn the request, and no client without it may have one
taken.
Longer than under pytest: python -m tests.fuzz.fuzz_vsh_token --cases 100000 --seed 1 [--target NAME]
"""

import argparse
import contextlib
import random
import sys
import time

from tests.fuzz.fuzz_vsh_wire import cut, damage, held, random_message
from vshd.firmware import read_oem_strings
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
from vshd.wire.client import ClientConnection
from vshd.wire.connection import Connection, default_limits
from vshd.wire.errors import RemoteProtocolError, TokenError
from vshd.wire.events import Established, Event, RequestReceived
from vshd.wire.frames import encode_frame
from vshd.wire.messages import Failure, GuestMessage, HostMessage, SetupConnectionRequest, SetupConnectionResponse
from vshd.wire.proof import CLIENT, NONCE_BYTES, SERVER, TOKEN_BYTES, Proof, parse_token, render_token
from vshd.wire.server import ServerConnection

SECRET = b"the-secret-command"
# One payload and one head before the proof.
UNPROVEN_MAX = 8192 + 64


def make_pair(rng: random.Random) -> tuple[ClientConnection, ServerConnection]:
    token = rng.randbytes(TOKEN_BYTES)
    client = ClientConnection(default_limits(), Proof(CLIENT, token, rng.randbytes(NONCE_BYTES)))
    client.send_setup(SetupConnectionRequest(argv=[SECRET, b"x" * rng.choice((0, 10, 9000))]))
    server = ServerConnection(
        default_limits(),
        Proof(SERVER, token, rng.randbytes(NONCE_BYTES)),
        allow_legacy_clients=rng.random() < 0.1,
    )
    return client, server


def feed(rng: random.Random, connection: Connection, data: bytes) -> list[Event]:
    """All events of a connection that is fed in random pieces."""
    events = []
    for piece in cut(rng, data):
        events += connection.receive_data(piece)
        assert held(connection) <= (UNPROVEN_MAX if "proof" in connection.state else 1 << 20)
    return events


def is_served(events: list[Event]) -> bool:
    return any(isinstance(event, RequestReceived) for event in events)


def nonsense(rng: random.Random, kind: type[GuestMessage] | type[HostMessage]) -> bytes:
    return b"".join(encode_frame(random_message(rng, kind).encode()[:4096], 4096) for _ in range(rng.randrange(4)))


def fuzz_server(rng: random.Random) -> None:
    """A right handshake, with something damaged, left out, put in or said twice."""
    client, server = make_pair(rng)
    stub = client.output.take()
    sent = damage(rng, stub)
    events = feed(rng, server, sent)
    answer = server.output.take()
    if sent == stub:
        client.receive_data(answer)
    right = client.output.take() if sent == stub else nonsense(rng, GuestMessage)
    talk = rng.choice((right, damage(rng, right), nonsense(rng, GuestMessage) + right, right[rng.randrange(60) :]))
    events += feed(rng, server, talk)
    if is_served(events) and not server._allow_legacy_clients:
        # Only the proof decides: behind it the request may well have been damaged.
        assert sent == stub
        message = GuestMessage()
        message.merge(right[4 : 4 + int.from_bytes(right[:4], "little")])
        assert message.member == messages.PROOF
        assert isinstance(message.value, bytes)
        assert message.value in talk


def fuzz_client(rng: random.Random) -> None:
    client, server = make_pair(rng)
    server.receive_data(client.output.take())
    answer = server.output.take()
    heard = rng.choice((answer, damage(rng, answer), nonsense(rng, HostMessage) + answer, damage(rng, answer) + answer))
    if rng.random() < 0.2:
        response = random_message(rng, SetupConnectionResponse)
        response.status = messages.READY
        heard = encode_frame(response.encode()[:4096], 4096) + nonsense(rng, HostMessage)
    events = feed(rng, client, heard)
    assert not any(isinstance(event, Established) for event in events)
    said = client.output.take()
    if said:
        assert heard.startswith(answer)
    else:
        assert client.state in ("broken", "over", "awaiting the response", "awaiting the proof")


def fuzz_strangers(rng: random.Random) -> None:
    """A client and a server of which at least one has another token, or none."""
    client, server = make_pair(rng)
    server._allow_legacy_clients = False
    if rng.random() < 0.5:
        server.proof = rng.choice((None, Proof(SERVER, rng.randbytes(TOKEN_BYTES), rng.randbytes(NONCE_BYTES))))
    else:
        client = ClientConnection(
            rng.choice((None, default_limits())),
            None,
        )
        client.send_setup(SetupConnectionRequest(argv=[SECRET]))
    has_token = client.proof is not None
    said = b""
    events = []
    for _ in range(4):
        data = client.output.take()
        said += data
        events += feed(rng, server, data)
        feed(rng, client, server.output.take())
    assert not is_served(events)
    assert not has_token or SECRET not in said


def fuzz_branch(rng: random.Random) -> None:
    """Both sides of a forward's branch, fed with what is damaged: only the right secret gets on, and little is kept."""
    token = rng.randbytes(TOKEN_SIZE)
    server, client = ServerBranch(token), ClientBranch(token)
    said = rng.choice((token[:SECRET_SIZE], damage(rng, token[:SECRET_SIZE]), rng.randbytes(40))) + GO + b"early"
    with contextlib.suppress(RemoteProtocolError):
        for piece in cut(rng, said):
            left = piece
            while left and not server.is_asked:
                taken = server.wanted
                server.receive_data(left[:taken])
                left = left[taken:]
    assert not server.is_proven or said.startswith(token[:SECRET_SIZE])
    assert len(server.rest) <= EARLY_MAX
    proof = rng.choice((token[SECRET_SIZE:], damage(rng, token[SECRET_SIZE:]), token[:SECRET_SIZE]))[:SECRET_SIZE]
    with contextlib.suppress(RemoteProtocolError):
        is_proven = client.receive_proof(proof)
        assert is_proven == (len(proof) == SECRET_SIZE)
    assert not client.is_proven or proof == token[SECRET_SIZE:]
    right = rng.choice((encode_acceptance(), encode_refusal(b"no", Failure(11, 111)))) + b"raw"
    heard = rng.choice((right, damage(rng, right), encode_frame(random_message(rng, Failure).encode()[:4096], 4096)))
    with contextlib.suppress(RemoteProtocolError):
        fresh = ClientBranch(token)
        response = None
        for piece in cut(rng, heard):
            response = response or fresh.receive_data(piece)
            assert len(fresh.rest) <= len(heard)
        assert response is not None or heard != right


def fuzz_text(rng: random.Random) -> None:
    token = rng.randbytes(TOKEN_BYTES)
    text = damage(rng, render_token(token))
    with contextlib.suppress(TokenError):
        found = parse_token(text)
        assert render_token(found) == text.removesuffix(b"\n")


def fuzz_table(rng: random.Random) -> None:
    """The firmware's tables: what is found in them stands in them, whatever they look like."""
    table = b""
    for _ in range(rng.randrange(6)):
        strings = [rng.choice((b"x", b"vmkit.token:", render_token(bytes(32)))) for _ in range(rng.randrange(4))]
        kind = rng.choice((0, 1, 11, 11, 127))
        body = rng.randbytes(rng.choice((0, 1, 20)))
        table += bytes((kind, 4 + len(body))) + b"\0\0" + body
        table += (b"".join(text + b"\0" for text in strings) or b"\0") + b"\0"
    table = damage(rng, table)
    for text in read_oem_strings(table):
        assert text in table
        assert b"\0" not in text


TARGETS = {
    "branch": fuzz_branch,
    "table": fuzz_table,
    "server": fuzz_server,
    "client": fuzz_client,
    "strangers": fuzz_strangers,
    "text": fuzz_text,
}


def run_cases(name: str, cases: int, seed: int) -> None:
    """Runs `cases` cases of one target; a failure names the command that repeats it."""
    for number in range(seed, seed + cases):
        try:
            TARGETS[name](random.Random(number))
        except BaseException as error:
            error.add_note(f"python -m tests.fuzz.fuzz_vsh_token --target {name} --cases 1 --seed {number}")
            raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*TARGETS])
    options = parser.parse_args()
    for name in [options.target] if options.target else TARGETS:
        started = time.monotonic()
        run_cases(name, options.cases, options.seed)
        print(f"{name}: {options.cases} cases in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
