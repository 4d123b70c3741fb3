"""What a guest prints, made fit for a terminal."""

import pytest

from vmkit.monitor.text import MAX_LINE_CHARACTERS, clean_line, clean_text, tail_lines


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (b"plain", "plain"),
        (b"a\tb\nc\r\n", "a\tb\nc\n"),
        (b"\x1b[31mred\x1b[0m", "red"),
        (b"\x1b[?25l\x1b[2J\x1b[1;1Hx", "x"),
        (b"\x1b]0;title\x07x", "x"),
        (b"\x1b]52;c;c2VjcmV0\x1b\\x", "x"),
        (b"\x1b]0;never ended", ""),
        (b"\x1bMx\x1bcy\x1b", "xcy"),
        (b"\x00\x07\x08\x0b\x7f", ""),
        ("\x9b31mx".encode(), "31mx"),
        ("ä € 😀".encode(), "ä € 😀"),
        ("user\u202etxt.exe\u200b".encode(), "usertxt.exe"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_text_keeps_what_is_printed_and_nothing_that_steers(raw: bytes, clean: str) -> None:
    assert clean_text(raw) == clean


def test_line_is_one_line_of_bounded_length() -> None:
    assert clean_line(b"  a \r\n b\tc ") == "a b c"
    assert len(clean_line(b"x" * 100_000)) == MAX_LINE_CHARACTERS


def test_tail_is_of_lines_that_hold_something() -> None:
    assert tail_lines(b"1\n\n2\n   \n3\r\n\x1b[0m\n", 2) == "2\n3"
    assert tail_lines(b"", 5) == ""
    assert max(map(len, tail_lines(b"y" * 5000 + b"\n" + b"z" * 5000, 2).splitlines())) == MAX_LINE_CHARACTERS
