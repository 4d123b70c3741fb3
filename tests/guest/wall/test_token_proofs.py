"""Strangers who reach vshd's port of a machine with a token, as every user of the host does on `vhost`: none gets in.

They have everything but the token: the protocol, this project's code, and recordings of what its owner said.
"""

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.guest.conftest import Run
from tests.guest.wall.ledger import LEDGER
from vmkit.machine import stop
from vsh.registry import find_machine
from vsh.token import read_token
from vshd.wire import messages
from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.events import Established
from vshd.wire.frames import encode_frame
from vshd.wire.messages import GuestMessage, HostMessage, SetupConnectionRequest, SetupConnectionResponse
from vshd.wire.proof import CLIENT, NONCE_BYTES, SERVER, Proof

WHERE = "strangers at the port of a machine with a token"
NAME = "tokened"
MARK = "/tmp/stranger-was-here"
REQUEST = SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"touch", MARK.encode()], nopty=True)
DEADLINE_S = 60.0
GUESSES = 64


@dataclass(frozen=True)
class Guest:
    """The port, and what a stranger cannot have: used only to make the recording."""

    path: str
    token: bytes = field(repr=False)


@pytest.fixture(scope="module")
def guest(built: None, vmkit: Run) -> Iterator[Guest]:
    done = vmkit("up", "--accel", "tcg", "--backend", "user", "--token", "--name", NAME, "--cid", "43")
    assert done.returncode == 0, done.stderr.decode()
    machine = find_machine(name=NAME)
    assert machine is not None
    assert machine.vsock is not None
    yield Guest(machine.vsock, read_token(str(Path(machine.directory) / "token")))
    stop.kill(machine)


class Stranger:
    """A connection to vshd's port, spoken to in frames."""

    def __init__(self, guest: Guest) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(guest.path)
        self.socket.sendall(b"CONNECT 9001\n")
        line = b""
        while not line.endswith(b"\n"):
            line += self.socket.recv(1)
        assert line.startswith(b"OK ")

    def say(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)

    def hear(self) -> bytes:
        """One frame's payload; empty at the end."""
        head = self._read(4)
        return self._read(int.from_bytes(head, "little")) if len(head) == 4 else b""

    def hear_all(self) -> list[bytes]:
        """Every payload until vshd has closed."""
        heard = []
        while payload := self.hear():
            heard.append(payload)
        return heard

    def close(self) -> None:
        self.socket.close()

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.socket.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            if not more:
                break
            data += more
        return data


def frame(message: SetupConnectionRequest | GuestMessage) -> bytes:
    return encode_frame(message.encode(), 1 << 20)


def prove(claim: bytes) -> bytes:
    return frame(GuestMessage(messages.PROOF, claim))


CHUNK = frame(GuestMessage(messages.REQUEST_CHUNK, REQUEST.encode()))


def make_stub(nonce: bytes, **changes: int) -> bytes:
    offer = default_limits()
    offer.nonce, offer.request_size = nonce, len(REQUEST.encode())
    for name, value in changes.items():
        setattr(offer, name, value)
    return frame(SetupConnectionRequest(target=messages.VM_SHELL, nopty=True, extended=offer))


def open_handshake(guest: Guest, stub: bytes) -> tuple[Stranger, bytes, bytes]:
    """A connection whose stub was answered: with the response and the server's proof."""
    stranger = Stranger(guest)
    stranger.say(stub)
    response = stranger.hear()
    message = HostMessage()
    message.merge(stranger.hear())
    assert message.member == messages.PROOF
    assert isinstance(message.value, bytes)
    return stranger, response, message.value


@pytest.fixture(scope="module")
def recording(guest: Guest) -> list[bytes]:
    """What the owner's client said in one session: its stub, and all that came after the server's proof."""
    client = ClientConnection(default_limits(), Proof(CLIENT, guest.token, os.urandom(NONCE_BYTES)))
    client.send_setup(SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"true"], nopty=True))
    owner = Stranger(guest)
    said = [client.output.take()]
    owner.say(said[0])
    events = [*client.receive_data(encode_frame(owner.hear(), 1 << 20))]
    events += client.receive_data(encode_frame(owner.hear(), 1 << 20))
    said.append(client.output.take())
    owner.say(said[1])
    events += client.receive_data(encode_frame(owner.hear(), 1 << 20))
    assert [type(event) for event in events] == [Established], "the recording is of a session that was let in"
    owner.close()
    return said


# Each yields one attempt after another; an attempt says all it has to say, and what it heard.
Attempts = Iterator[list[bytes]]


def say_nothing_of_a_token(guest: Guest, _recording: list[bytes]) -> Attempts:
    legacy = frame(REQUEST)
    extended = SetupConnectionRequest()
    extended.merge(REQUEST.encode())
    extended.extended = default_limits()
    deferred = default_limits()
    deferred.request_size = len(REQUEST.encode())
    for first in (legacy, frame(extended), frame(SetupConnectionRequest(extended=deferred)) + CHUNK):
        yield tell(Stranger(guest), first)


def leave_the_proof_out(guest: Guest, _recording: list[bytes]) -> Attempts:
    for words in (CHUNK, CHUNK + CHUNK, frame(REQUEST) + CHUNK, frame(GuestMessage(messages.SIGNAL_NUMBER, 9)) + CHUNK):
        stranger, _, _ = open_handshake(guest, make_stub(os.urandom(NONCE_BYTES)))
        yield tell(stranger, words)


def guess(guest: Guest, _recording: list[bytes]) -> Attempts:
    rng = random.Random(0)
    claims = [b"", bytes(1), bytes(31), bytes(32), bytes(33), b"\xff" * 32, bytes(4000)]
    claims += [rng.randbytes(32) for _ in range(GUESSES - len(claims))]
    for claim in claims:
        stranger, _, _ = open_handshake(guest, make_stub(rng.randbytes(NONCE_BYTES)))
        yield tell(stranger, prove(claim) + CHUNK)


def hand_the_servers_proof_back(guest: Guest, _recording: list[bytes]) -> Attempts:
    stranger, _, proof = open_handshake(guest, make_stub(os.urandom(NONCE_BYTES)))
    yield tell(stranger, prove(proof) + CHUNK)
    # With one connection's proof to the next, of the same nonce.
    stub = make_stub(bytes(NONCE_BYTES))
    first, _, proof = open_handshake(guest, stub)
    second, _, _ = open_handshake(guest, stub)
    yield tell(second, prove(proof) + CHUNK)
    first.close()


def be_the_server_to_the_server(guest: Guest, _recording: list[bytes]) -> Attempts:
    """A nonce of the server's, offered to it as ours: is there an answer in it that can be used?"""
    first, response, _ = open_handshake(guest, make_stub(os.urandom(NONCE_BYTES)))
    parsed = SetupConnectionResponse()
    parsed.merge(response)
    assert parsed.extended is not None
    second, _, proof = open_handshake(guest, make_stub(parsed.extended.nonce))
    yield tell(first, prove(proof) + CHUNK)
    second.close()


def replay(guest: Guest, recording: list[bytes]) -> Attempts:
    for _ in range(5):
        stranger, _, _ = open_handshake(guest, recording[0])
        yield tell(stranger, recording[1])
    yield tell(Stranger(guest), recording[0] + recording[1])
    yield tell(Stranger(guest), recording[1])


def use_another_token(guest: Guest, _recording: list[bytes]) -> Attempts:
    for role in (CLIENT, SERVER):
        for token in (bytes(32), b"\xff" * 32, os.urandom(32)):
            proof = Proof(role, token, os.urandom(NONCE_BYTES))
            stub = make_stub(proof.nonce)
            stranger, response, _ = open_handshake(guest, stub)
            proof.bind(stub[4:])
            proof.bind(response)
            yield tell(stranger, prove(proof.make()) + CHUNK)


def send_offers_that_are_none(guest: Guest, _recording: list[bytes]) -> Attempts:
    nonce = os.urandom(NONCE_BYTES)
    for stub in (
        make_stub(nonce[:31]),
        make_stub(nonce + b"x"),
        make_stub(nonce[:1]),
        make_stub(nonce, request_size=0),
        make_stub(nonce, request_size=2**32 - 1),
        make_stub(nonce, version=0),
    ):
        yield tell(Stranger(guest), stub + prove(bytes(32)) + CHUNK)


def tell(stranger: Stranger, words: bytes) -> list[bytes]:
    stranger.say(words)
    heard = stranger.hear_all()
    stranger.close()
    return heard


def is_let_in(payload: bytes) -> bool:
    """Whether a target runs: a response with a pid, at once or behind a deferred request."""
    response = SetupConnectionResponse()
    message = HostMessage()
    try:
        response.merge(payload)
        message.merge(payload)
    except RemoteProtocolError:
        # It was one of the two.
        pass
    return response.pid > 0 or (message.member == messages.STARTED and b"vsh ready" in payload)


@pytest.mark.parametrize(
    "attack",
    [
        say_nothing_of_a_token,
        leave_the_proof_out,
        guess,
        hand_the_servers_proof_back,
        be_the_server_to_the_server,
        replay,
        use_another_token,
        send_offers_that_are_none,
    ],
)
def test_stranger_runs_nothing(
    guest: Guest, recording: list[bytes], vsh: Run, attack: Callable[[Guest, list[bytes]], Attempts]
) -> None:
    heard = list(attack(guest, recording))
    assert heard
    done = vsh("--vm_name", NAME, "--", "rm", MARK)
    intrusions = sum(any(map(is_let_in, answers)) for answers in heard) + (done.returncode == 0)
    LEDGER.add(WHERE, len(heard), intrusions)
    assert intrusions == 0
    assert b"No such file" in done.stderr, done.stderr.decode()
