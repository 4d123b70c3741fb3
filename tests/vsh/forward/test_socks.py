"""The server's side of SOCKS 5 in memory: what clients say, where that leads, and what they are answered."""

import errno
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_socks import check_client
from vsh.errors import ExecError, Unanswered, VshError
from vsh.forward.socks import SocksError, SocksServer, choose_code, encode_answer
from vshd.wire import messages

GREETING = b"\x05\x01\x00"
ANSWER = b"\x05\x00"
PORT = (8080).to_bytes(2, "big")


def greeted() -> SocksServer:
    socks = SocksServer()
    assert socks.receive_data(GREETING) == ANSWER
    return socks


@pytest.mark.parametrize(
    ("kind_and_host", "target"),
    [
        (b"\x01" + socket.inet_aton("127.0.0.1"), "tcp:127.0.0.1:8080"),
        (b"\x04" + socket.inet_pton(socket.AF_INET6, "fd00::1"), "tcp:[fd00::1]:8080"),
        (b"\x03\x09localhost", "tcp:localhost:8080"),
        (b"\x03\x0bdb_1.test-x", "tcp:db_1.test-x:8080"),
        (b"\x03\x03::1", "tcp:[::1]:8080"),
        (b"\x03\xff" + b"a" * 255, f"tcp:{'a' * 255}:8080"),
    ],
)
def test_connect_names_a_place_of_the_guest(kind_and_host: bytes, target: str) -> None:
    socks = greeted()
    assert socks.receive_data(b"\x05\x01\x00" + kind_and_host + PORT) == b""
    assert (socks.target, socks.rest) == (target, b"")


def test_client_may_say_all_at_once_and_byte_by_byte() -> None:
    talk = GREETING + b"\x05\x01\x00\x03\x09localhost" + PORT
    at_once = SocksServer()
    assert at_once.receive_data(talk + b"GET /") == ANSWER
    assert (at_once.target, at_once.rest) == ("tcp:localhost:8080", b"GET /")
    slowly = SocksServer()
    answers = [slowly.receive_data(talk[index : index + 1]) for index in range(len(talk))]
    assert b"".join(answers) == ANSWER
    assert answers.index(ANSWER) == len(GREETING) - 1
    assert (slowly.target, slowly.rest) == ("tcp:localhost:8080", b"")


@pytest.mark.parametrize(
    ("request_", "code", "why"),
    [
        (b"\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50", 7, "BIND"),
        (b"\x05\x03\x00\x01\x7f\x00\x00\x01\x00\x50", 7, "UDP ASSOCIATE"),
        (b"\x05\xf0\x00\x03", 7, "command 240"),
        (b"\x05\x01\x00\x02", 8, "unknown kind 2"),
        (b"\x04\x01\x00\x01", 1, "version 4"),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x00", 1, "port 0"),
        (b"\x05\x01\x00\x03\x00\x00\x50", 4, "cannot be"),
        # For getaddrinfo() this is every address, and for us a kind of place.
        (b"\x05\x01\x00\x03\x01*\x00\x50", 4, "cannot be"),
        (b"\x05\x01\x00\x03\x04a\x00b \x00\x50", 4, "cannot be"),
        (b"\x05\x01\x00\x03\x03\x1b[m\x00\x50", 4, "cannot be"),
    ],
)
def test_what_is_not_served_has_a_code_and_a_reason(request_: bytes, code: int, why: str) -> None:
    socks = greeted()
    with pytest.raises(SocksError, match=why) as caught:
        socks.receive_data(request_)
    assert caught.value.answer == encode_answer(code)
    assert caught.value.brief.isprintable()


@pytest.mark.parametrize(
    ("talk", "answer", "why"),
    [
        (b"\x05\x01\x02", b"\x05\xff", "without a password"),
        (b"\x05\x00", b"\x05\xff", "without a password"),
        (b"\x04\x01\x00\x50", b"\x00\x5b" + bytes(6), "SOCKS 4"),
        (
            b"GET http://x/ HTTP/1.1\r\n",
            b"HTTP/1.0 400 this is a SOCKS 5 proxy\r\nConnection: close\r\n\r\n",
            "socks5h",
        ),
        (b"\x16\x03\x01", b"", "its first byte is 22"),
    ],
)
def test_strangers_are_told_in_their_own_words(talk: bytes, answer: bytes, why: str) -> None:
    with pytest.raises(SocksError, match=why) as caught:
        SocksServer().receive_data(talk)
    assert caught.value.answer == answer


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ExecError("", kind=messages.UNREACHABLE, error=errno.ECONNREFUSED), 5),
        (ExecError("", kind=messages.UNREACHABLE, error=errno.ENETUNREACH), 3),
        (ExecError("", kind=messages.UNREACHABLE, error=errno.EHOSTUNREACH), 4),
        (ExecError("", kind=messages.UNREACHABLE, error=errno.ETIMEDOUT), 4),
        (ExecError("no such name", kind=messages.UNREACHABLE, error=errno.EADDRNOTAVAIL), 4),
        (ExecError("", kind=messages.UNREACHABLE, error=errno.EPERM), 2),
        (ExecError("", kind=messages.LIMIT), 1),
        (Unanswered("the guest is stuck"), 4),
        (VshError("anything else"), 1),
    ],
)
def test_failure_in_the_guest_has_its_code(error: VshError, code: int) -> None:
    assert choose_code(error) == code


@given(st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=5))
def test_any_bytes_give_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    for talk in (data, GREETING + data, GREETING + b"\x05\x01\x00" + data):
        check_client(talk, [min(cut, len(talk)) for cut in cuts])
