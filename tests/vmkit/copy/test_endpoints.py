"""The words of the command line: which are paths of machines."""

import pytest

from vmkit.copy.endpoints import Endpoint, parse_endpoint, plan_copy, split_destination, split_source
from vmkit.errors import ConfigError


@pytest.mark.parametrize(
    ("word", "endpoint"),
    [
        ("file", Endpoint(None, b"file")),
        ("/a:b", Endpoint(None, b"/a:b")),
        ("./a:b", Endpoint(None, b"./a:b")),
        ("-", Endpoint(None, b"", is_stream=True)),
        ("tiny:/etc", Endpoint("tiny", b"/etc")),
        ("3:x", Endpoint("3", b"x")),
        (":x", Endpoint("", b"x")),
        (":", Endpoint("", b".")),
        ("tiny:~", Endpoint("tiny", b".")),
        ("tiny:~/x:y", Endpoint("tiny", b"x:y")),
        ("tiny:\udcff", Endpoint("tiny", b"\xff")),
    ],
)
def test_word_is_an_endpoint(word: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(word) == endpoint


@pytest.mark.parametrize(
    ("words", "brief"),
    [
        (["m:x"], "needs a source and a destination"),
        (["a", "b"], "neither a nor b is on a machine"),
        (["m:a", "b", "c"], "neither b nor c is on a machine"),
        (["m:a", "m:b", "-"], "`-` goes with one source"),
        (["-", "a", "m:b"], "`-` goes with one source"),
        (["-", "-"], "neither - nor - is on a machine"),
        (["", "m:b"], "must not be empty"),
        (["a\0b", "m:b"], "NUL"),
    ],
)
def test_copy_that_is_none_is_refused(words: list[str], brief: str) -> None:
    with pytest.raises(ConfigError, match=brief):
        plan_copy(words)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (b"a/b", (b"a", b"b")),
        (b"a/b//", (b"a", b"b")),
        (b"b", (b".", b"b")),
        (b"/b", (b"/", b"b")),
        (b"/", (b"/", b".")),
        (b".", (b".", b".")),
        (b"a/..", (b"a/..", b".")),
    ],
)
def test_source_has_a_directory_and_a_name(path: bytes, parts: tuple[bytes, bytes]) -> None:
    assert split_source(path) == parts


def test_destination_needs_a_name() -> None:
    assert split_destination(b"/a/b") == (b"/a", b"b")
    assert split_destination(b"b") == (b".", b"b")
    for path in (b"a/", b"a/.", b"..", b"/"):
        with pytest.raises(ConfigError, match="not an existing directory"):
            split_destination(path)
