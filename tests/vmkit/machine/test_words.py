"""Requests to a monitor and its answers as lines: a table, both ways, and lines that are neither."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.machine.words import (
    REQUESTS,
    VERSION,
    Answer,
    Ended,
    ExpectEnd,
    Quit,
    Request,
    Watch,
    WordError,
    parse_answer,
    parse_request,
    render_answer,
    render_end,
    render_request,
)


@pytest.mark.parametrize("request_", [Watch(), ExpectEnd(), Quit(), Quit(by="down")], ids=repr)
def test_request_comes_back_from_its_line(request_: Request) -> None:
    line = render_request(request_)
    assert line.endswith(b"\n")
    assert parse_request(line) == request_
    assert json.loads(line)["version"] == VERSION


def test_every_kind_has_one_word_of_its_own() -> None:
    assert len(set(REQUESTS.values())) == len(REQUESTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"quit", "no request"),
        (b"", "no request"),
        (b"\xff", "no request"),
        (b"[" * 4000, "no request"),
        (b'["quit"]', "no request"),
        (b'{"version": 1}', "no request"),
        (b'{"version": 1, "do": null}', "no request"),
        (b'{"version": 1, "do": ["quit"]}', "no request"),
        (b'{"do": "quit"}', "speaks version 1 of the requests, not None"),
        (b'{"version": 2, "do": "quit"}', "speaks version 1 of the requests, not 2"),
        (b'{"version": 1, "do": "dance"}', "knows no request 'dance'"),
        (b'{"version": 1, "do": "quit", "by": 7}', "'by' of the request 'quit' has another type"),
        (b'{"version": 1, "do": "quit", "more": 1}', "'quit' has no 'more'"),
    ],
)
def test_line_that_is_no_request_is_refused_with_its_reason(line: bytes, message: str) -> None:
    with pytest.raises(WordError, match=message):
        parse_request(line)


@pytest.mark.parametrize(
    "answer", [Answer(True), Answer(False, "no"), Answer(False, "no", "do this"), Answer(True, values={"a": 1})]
)
def test_answer_comes_back_from_its_line(answer: Answer) -> None:
    assert parse_answer(render_answer(answer)) == answer


def test_end_comes_back_from_its_line() -> None:
    ended = Ended("panic", "it panicked", expected=False)
    assert parse_answer(render_end(ended)) == ended


@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: json.dumps({"do": text, "version": 1}).encode()))
def test_any_line_is_a_value_or_a_word_error(line: bytes) -> None:
    assert isinstance(parse_answer(line), Answer | Ended | None)
    with contextlib.suppress(WordError):
        parse_request(line)
