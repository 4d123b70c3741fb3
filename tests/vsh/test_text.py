"""What a guest prints, made fit for a terminal."""

import random
import re

import pytest

from vsh.errors import VshError
from vsh.text import MAX_LINE_CHARACTERS, MAX_SEQUENCE_CHARACTERS, Cleaner, clean_line, clean_text, tail_lines

# Everything at once: controls of both sets, every kind of sequence, broken UTF-8, text that runs backwards.
HOSTILE = (
    b"\x1b]0;owned\x07\x1b]52;c;c2VjcmV0\x1b\\\x1b[2J\x1b[1;1H\x1bP1$r\x1b\\\x1b_apc\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\"
    b"\x1b(B\x1b#8\x1bc\xc2\x9b31m\xc2\x9d0;title\xc2\x9c\xc2\x85\x00\x07\x08\x0e\x7f\xff\xc3seen\xe2\x80\xae\xe2\x81\xa6\r\n"
    b"first\rsecond\r\r\nend"
)
SEEN = "\ufffd\ufffdseen\nfirst\nsecond\nend"
# What may reach a terminal, whatever came in.
FIT = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*")


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
        (b"\x1bMx\x1bcy\x1b", "xy"),
        (b"\x00\x07\x08\x0b\x7f", ""),
        ("\x9b31mx".encode(), "x"),
        (b"a\x1b]0;never ended\nb", "a\nb"),
        (b"a\x1b[31", "a"),
        (b"10%\r20%\r\n", "10%\n20%\n"),
        ("a\u3000b\u00a0c".encode(), "a\u3000b\u00a0c"),
        (HOSTILE, SEEN),
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


def test_bytes_of_a_path_that_are_no_utf8_are_shown() -> None:
    assert clean_text("caf\udce9\x1b[31m") == "caf\\xe9"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_stream_in_pieces_is_cleaned_as_a_whole(size: int) -> None:
    cleaner = Cleaner()
    pieces = [cleaner.feed(HOSTILE[at : at + size]) for at in range(0, len(HOSTILE), size)]
    assert "".join(pieces) + cleaner.finish() == SEEN


def test_stream_of_random_controls_is_fit_in_whatever_pieces() -> None:
    rng = random.Random(7)
    alphabet = [b"\x1b", b"[", b"]", b"P", b"\\", b"\x07", b"\n", b"\r", b"m", b"3", b";", b"\xc2\x9b", b"\xc2\x9d",
                b"\xc2\x9c", b"\xff", b"\xe2\x80\xae", b"x", b"\x00", b"\x08", b"(", b" "]  # fmt: skip
    for _ in range(2000):
        data = b"".join(rng.choices(alphabet, k=rng.randrange(40)))
        cleaner = Cleaner()
        cut = rng.randrange(len(data) + 1)
        text = cleaner.feed(data[:cut]) + cleaner.feed(data[cut:]) + cleaner.finish()
        assert text == clean_text(data), data
        assert FIT.fullmatch(text), data


def test_sequence_that_never_ends_does_not_hold_the_stream_back() -> None:
    cleaner = Cleaner()
    cleaner.feed(b"\x1b]0;" + b"x" * MAX_SEQUENCE_CHARACTERS)
    assert cleaner.feed(b"shown") == "shown"


@pytest.mark.parametrize("piece", [b"\x1b]", b"\r", b"\xc2\x90", b"\x1b[3", b"\x1b  "])
def test_flood_of_one_kind_is_read_in_one_pass(piece: bytes) -> None:
    """A pattern that began anew at every control would take hours for this."""
    data = piece * 200_000
    cleaner = Cleaner()
    assert FIT.fullmatch(cleaner.feed(data) + cleaner.feed(b"x\n") + cleaner.finish() + clean_text(data + b"x"))


def test_error_is_rendered_fit_for_a_terminal() -> None:
    text = HOSTILE.decode(errors="replace")
    lines = VshError(f"no {text}", details=f"it said: {text}", hint=text).render("vsh").splitlines()
    shown = SEEN.splitlines()
    assert lines[0] == f"vsh: no {' '.join(shown)}"
    assert lines[1:5] == [f"  {line}" for line in f"it said: {SEEN}".splitlines()]
    assert lines[5:] == [f"hint: {' '.join(shown)}"]
