"""Cleans the output of guests and programs for a person: removes everything that steers a terminal. No I/O.

It drops C0 and C1 controls, the sequences they begin (ECMA-48, 5.3 to 5.6), and characters that are invisible or turn
text around (bidi overrides). Bytes that are no UTF-8 become U+FFFD.
"""

import codecs
import re

# Longer lines help no reader. A whole report must fit into a line that `up` reads (launch.MAX_REPORT_LINE_BYTES).
MAX_LINE_CHARACTERS = 400
# A sequence that is longer is no sequence: what follows is shown again.
MAX_SEQUENCE_CHARACTERS = 4096

_CSI = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*"
# Titles, the clipboard, device control. On a terminal they end at ST or BEL; here at the line's end as well, so that
# one that never ends hides one line at most.
_STRING = r"(?:\x1b[PX\]^_]|[\x90\x98\x9d-\x9f])[^\x07\x18\x1a\x1b\x80-\x9f\n]*"
_ESCAPE = r"\x1b[ -/]*"
_SEQUENCE = re.compile(rf"{_CSI}[@-~]?|{_STRING}(?:\x07|\x1b\\|\x9c)?|{_ESCAPE}[0-~]?")
_UNFINISHED = re.compile(rf"(?:{_CSI}|{_STRING}\x1b?|{_ESCAPE})\Z")
# A carriage return of its own would overwrite the line before.
_LINE_END = re.compile(r"\r+\n?")
_ASCII_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# Spaces that str.isprintable() does not count.
_KEPT = frozenset(
    "\n\t\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
)
# Bytes of a path or an argument that are no UTF-8 (PEP 383).
_LONE_BYTE = re.compile("[\udc80-\udcff]")


def clean_text(text: bytes | str) -> str:
    """Returns printable text, newlines and tabs. In a str of a path, bytes that are no UTF-8 become `\\xNN`."""
    if isinstance(text, str):
        return _clean(_LONE_BYTE.sub(lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text))
    return _clean(text.decode(errors="replace"))


def clean_line(text: bytes | str) -> str:
    """Returns the text as one line, cut when it is too long to be read."""
    return _shorten(" ".join(clean_text(text).split()))


def tail_lines(data: bytes, lines: int) -> str:
    """Returns the last lines that are not empty."""
    held = [line.rstrip() for line in clean_text(data).split("\n") if line.strip()]
    return "\n".join(_shorten(line) for line in held[-lines:])


class Cleaner:
    """Cleans a stream in pieces. Invariant: `_held` is the start of a sequence, or returns that end a line."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """Returns the text that later bytes cannot change."""
        text = self._held + self._decoder.decode(data)
        unfinished = _UNFINISHED.search(text)
        end = len(text.rstrip("\r")) if unfinished is None else unfinished.start()
        if len(text) - end > MAX_SEQUENCE_CHARACTERS:
            end = len(text)
        self._held = text[end:]
        return _clean(text[:end])

    def finish(self) -> str:
        """Returns the text that is left when no more bytes come."""
        text, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return _clean(text)


def _clean(text: str) -> str:
    text = _SEQUENCE.sub("", _LINE_END.sub("\n", text))
    if text.isascii():
        return _ASCII_CONTROL.sub("", text)
    return "".join(letter for letter in text if letter in _KEPT or letter.isprintable())


def _shorten(line: str) -> str:
    return line if len(line) <= MAX_LINE_CHARACTERS else line[: MAX_LINE_CHARACTERS - 4] + " ..."
