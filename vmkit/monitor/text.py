"""What guests and programs print, made fit for a person's terminal: no control sequences, no endless lines. Pure."""

import re

# A line that is longer says nothing more; a whole report must fit into what `up` reads (launch.MAX_REPORT_LINE_BYTES).
MAX_LINE_CHARACTERS = 400

# CSI sequences (colours, cursor), OSC strings (titles, clipboard), and other escapes of two bytes: ECMA-48, 5.3 to 5.6.
_SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])?")


def clean_text(data: bytes) -> str:
    """Printable text, newlines and tabs; everything that could move a cursor, colour, or turn text around is gone."""
    text = _SEQUENCES.sub("", data.decode(errors="replace"))
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())


def clean_line(data: bytes) -> str:
    """One line of it, cut where it is too long to be read."""
    return _shorten(" ".join(clean_text(data).split()))


def tail_lines(data: bytes, lines: int) -> str:
    """The last lines that hold anything."""
    held = [line.rstrip() for line in clean_text(data).split("\n") if line.strip()]
    return "\n".join(_shorten(line) for line in held[-lines:])


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_LINE_CHARACTERS else line[: MAX_LINE_CHARACTERS - 4] + " ..."
