"""Messages as JSON: both ways, and what is said of JSON that stands for no message."""

import pytest

from vmkit.errors import ConfigError
from vmkit.maitred.forms import parse_form, render_form
from vmkit.maitred.messages import (
    LAUNCHED,
    LaunchProcessRequest,
    LaunchProcessResponse,
    MountResponse,
    SetTimeRequest,
    SetUpUserRequest,
)

FULL = {"argv": ["ls", "-l", "ü"], "env": {"A": "1"}, "respawn": False, "use_console": True, "wait_for_exit": True}


def test_request_is_the_same_both_ways() -> None:
    message = parse_form(LaunchProcessRequest, FULL)
    assert isinstance(message, LaunchProcessRequest)
    assert (message.argv, message.env) == ([b"ls", b"-l", "ü".encode()], {b"A": b"1"})
    assert render_form(message) == FULL


def test_message_within_a_message() -> None:
    message = parse_form(SetTimeRequest, {"time": {"seconds": 5}})
    assert render_form(message) == {"time": {"seconds": 5, "nanos": 0}}


def test_answer_has_every_field_and_names_its_status() -> None:
    assert render_form(LaunchProcessResponse(LAUNCHED)) == {"status": "LAUNCHED", "code": 0}
    assert render_form(LaunchProcessResponse(99, -1)) == {"status": 99, "code": -1}
    assert render_form(MountResponse(19)) == {"error": 19}


def test_text_that_is_no_utf8_can_be_shown() -> None:
    request = SetUpUserRequest()
    request.username = b"\xff"
    assert render_form(request)["username"] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("value", "words", "hint"),
    [
        ([], "the request must be a JSON object", ""),
        ({"argw": []}, "the request has no field 'argw'", "did you mean 'argv'?"),
        ({"argv": "ls"}, "argv must be a list of texts, not text", ""),
        ({"argv": [1]}, "argv must be text, not 1", ""),
        ({"argv": ["\ud800"]}, "argv has half of a character", ""),
        ({"env": ["A=1"]}, "env must be an object of texts, not a list", ""),
        ({"respawn": 1}, "respawn must be true or false, not 1", ""),
    ],
)
def test_wrong_request_is_explained(value: object, words: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_form(LaunchProcessRequest, value)
    assert caught.value.brief.startswith(words)
    assert caught.value.hint == hint


@pytest.mark.parametrize("uid", [-1, 1 << 32, 1.5, True, "0", None])
def test_number_has_its_limits(uid: object) -> None:
    with pytest.raises(ConfigError, match="uid must be a whole number between 0 and 4294967295"):
        parse_form(SetUpUserRequest, {"uid": uid})
