"""A second user of the host on `vhost`, where anybody can connect: without the machine's token nothing runs.

The real daemon demands a token on a UNIX socket that the attacker may open; over the kernel's vsock the outer machine's
tests do the same (test_vhost.py).
"""

import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.wall.inside import attacker
from tests.guest.wall.ledger import LEDGER
from tests.vsh.live import Vshd
from vshd.wire import messages
from vshd.wire.client import ClientConnection
from vshd.wire.connection import default_limits
from vshd.wire.events import Established
from vshd.wire.messages import SetupConnectionRequest
from vshd.wire.proof import CLIENT, NONCE_BYTES, PROOF_BYTES, Proof, render_token

TOKEN = bytes(range(32))
GUESSES = 300
RANDOM = random.Random(9001)
TIMEOUT_S = 20.0


class Guess(Proof):
    """A proof by somebody who does not know the token, and believes every server."""

    def __init__(self, make: Callable[["Guess"], bytes], nonce: bytes) -> None:
        super().__init__(CLIENT, bytes(32), nonce)
        self._guess = make
        self.of_server = b""

    def is_peers(self, claim: bytes) -> bool:
        self.of_server = claim
        return True

    def make(self) -> bytes:
        return self._guess(self)


@pytest.fixture
def vshd(tmp_path: Path) -> Iterator[Vshd]:
    token = tmp_path / "token"
    token.write_bytes(render_token(TOKEN))
    token.chmod(0o600)
    daemon = Vshd(tmp_path, [f"--token_from=file:{token}"])
    yield daemon
    assert daemon.stop() == 0, daemon.log


def attack(vshd: Vshd, proof: Proof | None) -> tuple[bool, bytes]:
    """Whether a session was had, and all that was sent for it."""
    client = ClientConnection(default_limits(), proof)
    client.send_setup(SetupConnectionRequest(target=messages.VM_SHELL, argv=[b"id"], nopty=True))
    sent = b""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(vshd.path))
        while not client.is_finished:
            data = client.output.take()
            sent += data
            try:
                connection.sendall(data)
                answer = connection.recv(65536)
            except OSError:
                break
            if not answer:
                break
            if any(isinstance(event, Established) for event in client.receive_data(answer)):
                return True, sent
    return False, sent


def note(what: str, results: list[bool]) -> None:
    LEDGER.add(f"vshd with a token, {what}", len(results), sum(results))
    assert not any(results)


def test_owner_of_the_token_gets_in(vshd: Vshd) -> None:
    assert attack(vshd, Proof(CLIENT, TOKEN, os.urandom(NONCE_BYTES)))[0]


def say(claim: bytes) -> Callable[[Guess], bytes]:
    return lambda _: claim


def test_guessed_proofs_get_nothing(vshd: Vshd) -> None:
    claims = [b"", bytes(PROOF_BYTES), b"\xff" * PROOF_BYTES, bytes(PROOF_BYTES - 1), bytes(PROOF_BYTES + 1)]
    claims += [RANDOM.randbytes(PROOF_BYTES) for _ in range(GUESSES)]
    note("guessed proofs", [attack(vshd, Guess(say(claim), bytes(32)))[0] for claim in claims])


def test_no_proof_gets_nothing(vshd: Vshd) -> None:
    results = [attack(vshd, None)[0]]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(vshd.path))
        connection.sendall(attacker.HELLO)
        results.append(attacker.judge(connection.recv(4096)) != "refused")
    note("no proof", results)


def test_servers_proof_handed_back_gets_nothing(vshd: Vshd) -> None:
    note("reflected proofs", [attack(vshd, Guess(lambda guess: guess.of_server, RANDOM.randbytes(32)))[0]])


def test_recorded_session_played_again_gets_nothing(vshd: Vshd) -> None:
    nonce = os.urandom(NONCE_BYTES)
    owner = Proof(CLIENT, TOKEN, nonce)
    is_in, sent = attack(vshd, owner)
    assert is_in
    results = []
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(vshd.path))
            connection.sendall(sent)
            results.append(b"uid=" in read_all(connection))
    # The same nonce and the same proof, with the server's new nonce in between.
    results += [attack(vshd, Guess(lambda _: owner.make(), nonce))[0] for _ in range(20)]
    note("replayed proofs", results)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except OSError:
        pass
    return data
