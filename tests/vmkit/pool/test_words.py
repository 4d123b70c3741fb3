"""Requests to a pool's keeper and its answers: what is none is refused with a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.pool.words import (
    PoolLineError,
    Status,
    Verb,
    parse_answer,
    parse_request,
    parse_status,
    render_request,
    render_status,
)


@pytest.mark.parametrize("verb", Verb)
def test_request_is_read_as_it_was_written(verb: Verb) -> None:
    assert parse_request(render_request(verb)) is verb


def test_status_is_read_as_it_was_written() -> None:
    status = Status("p", "tiny", 4, ("p-1", "p-2"), 7, "no memory")
    assert parse_status(parse_answer(render_status(status))) == status


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"{", b"[]\n", b'{"do": "fly"}\n', b'{"do": 1}\n', b"\xff\n", b"[" * 9999]
)
def test_line_that_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(PoolLineError):
        parse_request(line)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parsers(line: bytes) -> None:
    for parse in (parse_request, lambda line: parse_status(parse_answer(line))):
        try:
            parse(line)
        except PoolLineError:
            continue
