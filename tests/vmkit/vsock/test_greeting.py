"""The CONNECT line, whole, in pieces, and followed by bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.vsock.greeting import GREETING_MAX_BYTES, GreetingError, find_greeting, render_answer


@pytest.mark.parametrize("port", [0, 1, 9001, 2**32 - 2])
@pytest.mark.parametrize("trailing", [b"", b"x", b"\nCONNECT 5\n"])
def test_greeting_is_found_at_every_length_and_not_before(port: int, trailing: bytes) -> None:
    line = b"CONNECT %d\n" % port
    for size in range(len(line)):
        assert find_greeting(line[:size]) is None
    greeting = find_greeting((line + trailing)[:GREETING_MAX_BYTES])
    assert greeting is not None
    assert (greeting.port, greeting.size_bytes) == (port, len(line))


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"connect 5\n",
        b"CONNECT 5\r\n",
        b"CONNECT  5\n",
        b"CONNECT -1\n",
        b"CONNECT +1\n",
        b"CONNECT 1_0\n",
        b"CONNECT 0x10\n",
        "CONNECT \u0665\n".encode(),
        b"CONNECT 4294967295\n",
        b"CONNECT 99999999999999999999\n",
        b"CONNECT " + b"0" * GREETING_MAX_BYTES,
        b"GET / HTTP/1.1\r\n",
        b"SSH",
        b"\0",
    ],
)
def test_greeting_refuses_what_can_never_be_one(line: bytes) -> None:
    with pytest.raises(GreetingError, match="not a CONNECT line"):
        find_greeting(line)


@given(st.binary(max_size=GREETING_MAX_BYTES))
def test_greeting_of_any_bytes_is_a_port_or_an_error(data: bytes) -> None:
    try:
        greeting = find_greeting(data)
    except GreetingError:
        return
    assert greeting is None or (0 <= greeting.port < 2**32 - 1 and data[greeting.size_bytes - 1] == 10)


def test_answer_names_the_host_port() -> None:
    assert render_answer(2**30) == b"OK 1073741824\n"
