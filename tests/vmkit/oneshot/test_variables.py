"""Variables on the command line and in files, as docker reads them; a wrong line is named by its number."""

from pathlib import Path

import pytest

from vmkit.errors import ConfigError
from vmkit.oneshot.variables import FILE_BYTES_MAX, merge, parse_assignment, parse_lines, read_file

ENVIRON = {"HERE": "there"}


def test_option_is_a_value_or_this_hosts_own() -> None:
    assert parse_assignment("A=b=c", ENVIRON) == ("A", "b=c")
    assert parse_assignment("A=", ENVIRON) == ("A", "")
    assert parse_assignment("HERE", ENVIRON) == ("HERE", "there")
    assert parse_assignment("GONE", ENVIRON) == ("GONE", None)
    for text in ("", "=b"):
        with pytest.raises(ConfigError, match="--env must be NAME=VALUE or NAME"):
            parse_assignment(text, ENVIRON)


def test_lines_are_taken_as_they_stand() -> None:
    text = '\ufeff# a comment\n\n  A=b # no comment\r\nQUOTED="c"\nHERE\nGONE\nE=\n'
    assert parse_lines(text, "f", ENVIRON) == [
        ("A", "b # no comment"),
        ("QUOTED", '"c"'),
        ("HERE", "there"),
        ("E", ""),
    ]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("A=b\n=c\n", "f:2: a name is missing before the ="),
        ("A=b\n\n\nA B=c", "f:4: the name 'A B' has a blank in it"),
        ("export A=b", "f:1: the name 'export A' has a blank in it"),
        ("A=\0", "f:1: the line has a NUL byte"),
    ],
)
def test_wrong_line_is_named(text: str, seen: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_lines(text, "f", ENVIRON)
    assert caught.value.brief == seen


def test_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "env"
    for data, seen in (
        (b"A=b\nB=\xff\n", f"{path}:2: the line is no UTF-8"),
        (bytes(FILE_BYTES_MAX + 1), f"--env-file {path} has more than {FILE_BYTES_MAX} bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            read_file(path, ENVIRON)
        assert caught.value.brief == seen
    for odd in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read --env-file {odd}: "):
            read_file(odd, ENVIRON)
    path.write_text("A=ä\n")
    assert read_file(path, ENVIRON) == [("A", "ä")]


def test_user_changes_adds_and_takes_out() -> None:
    image = ("A=1", "B=2", "C=3", "A=4", "no variable", "=5")
    assert merge(image, [("B", "new"), ("D", "6"), ("C", None), ("GONE", None)]) == {"A": "4", "B": "new", "D": "6"}
