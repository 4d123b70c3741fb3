"""vsh's command line: upstream's spellings, ours, and what is wrong."""

import re

import pytest

from vsh.errors import VshError
from vsh.flags import HELP, KINDS, SHORT, SHORT_WITH_VALUE, parse_flags, split_command


@pytest.mark.parametrize(
    "words",
    [
        ["--cid=3", "--", "ls", "-l"],
        ["--cid", "3", "--", "ls", "-l"],
        ["-cid=3", "--", "ls", "-l"],
        ["--cid=3", "ls", "-l"],
        ["--cid", "3", "ls", "-l"],
        ["--cid=7", "--cid=3", "ls", "-l"],
    ],
)
def test_spellings_of_a_value(words: list[str]) -> None:
    options = parse_flags(words)
    assert options.cid == 3
    assert options.command == ["ls", "-l"]


@pytest.mark.parametrize("word", ["--vm_name=x", "--vm-name=x", "-vm_name=x"])
def test_dash_stands_for_underscore(word: str) -> None:
    assert parse_flags([word]).vm_name == "x"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], True),
        (["--extended"], True),
        (["--noextended"], False),
        (["--extended=false"], False),
        (["--extended=1"], True),
    ],
)
def test_spellings_of_a_boolean(words: list[str], value: bool) -> None:
    assert parse_flags(words).extended is value


def test_short_flags_and_their_bundles() -> None:
    options = parse_flags(["-tqv", "cmd"])
    assert (options.tty, options.quiet, options.verbose, options.notty) == (True, True, True, False)
    assert parse_flags(["-T"]).notty
    assert parse_flags(["--v=2"]).verbose


def test_words_keep_their_blanks() -> None:
    assert parse_flags(["--cid=3", "--", "echo", "  x "]).command == ["echo", "  x "]


def test_flags_of_the_command_are_its_own() -> None:
    assert parse_flags(["--cid=3", "sh", "-c", "x", "--", "y"]).command == ["sh", "-c", "x", "--", "y"]
    assert parse_flags(["--cid=3", "--", "--help"]).command == ["--help"]
    assert parse_flags(["--cid=3", "-", "x"]).command == ["-", "x"]


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--nonsense"], 64, "ERROR: unknown command line flag 'nonsense'"),
        (["--nocid"], 64, "ERROR: unknown command line flag 'nocid'"),
        (["--cid=x"], 65, "ERROR: illegal value 'x' specified for uint64 flag 'cid'"),
        (["--cid=-1"], 65, "ERROR: illegal value '-1' specified for uint64 flag 'cid'"),
        (["--cid=\u0663"], 65, "ERROR: illegal value '\u0663' specified for uint64 flag 'cid'"),
        (["--cid=18446744073709551616"], 65, "uint64 flag 'cid'"),
        (["--cid"], 65, "ERROR: illegal value '' specified for uint64 flag 'cid'"),
        (["--listen_port=4294967296"], 65, "uint32 flag 'listen_port'"),
        (["--timeout=soon"], 65, "double flag 'timeout'"),
        (["--timeout=nan"], 65, "double flag 'timeout'"),
        (["--timeout=-1"], 65, "double flag 'timeout'"),
        (["--extended=maybe"], 65, "bool flag 'extended'"),
        (["--env=X"], 65, "flag 'env'"),
        (["--env==x"], 65, "flag 'env'"),
    ],
)
def test_wrong_words_are_named(words: list[str], status: int, text: str) -> None:
    with pytest.raises(VshError) as caught:
        parse_flags(words)
    assert caught.value.status == status
    assert text in caught.value.brief


@pytest.mark.parametrize(
    ("words", "environment", "argv"),
    [
        ([], {}, []),
        (["A=1", "B=", "C=x=y", "cmd", "D=1"], {b"A": b"1", b"B": b"", b"C": b"x=y"}, [b"cmd", b"D=1"]),
        (["A==b"], {b"A": b"=b"}, []),
        (["=x", "A=1"], {}, [b"=x", b"A=1"]),
        (["cmd"], {}, [b"cmd"]),
        (["\udcff=\udcfe", "\udcfd"], {b"\xff": b"\xfe"}, [b"\xfd"]),
    ],
)
def test_leading_assignments(words: list[str], environment: dict[bytes, bytes], argv: list[bytes]) -> None:
    assert split_command(words) == (environment, argv)


def test_help_names_every_flag() -> None:
    flags = set(re.findall(r"(?<!\S)--([a-z_]+)", HELP.replace("--noextended", "--extended")))
    assert flags == set(KINDS)
    letters = set(re.findall(r"^ +-([a-zA-Z])\b", HELP, re.MULTILINE))
    assert letters == set(SHORT) | set(SHORT_WITH_VALUE)


def test_help_fits_a_screen_of_120_columns() -> None:
    assert [line for line in HELP.splitlines() if len(line) > 120] == []
