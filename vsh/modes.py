"""The modes that a guest's program turns on in the local terminal, and the bytes that turn them off again.

A full-screen program takes the alternate screen, the mouse and the cursor, and gives them back at its end. When the
connection ends first, vsh gives them back. Only what was turned on is turned off: leaving an alternate screen that was
never entered moves the cursor.

Source: xterm's control sequences (DECSET, DECRST, DECKPAM). Knows nothing of descriptors.
"""

# A longer sequence is none of these; one that is cut waits for its rest.
SEQUENCE_BYTES_MAX = 64
_DIGITS = b"0123456789;"
# Those that are on by default: the cursor, and the wrap at the right margin.
_ON = frozenset((25, 7))
# Cursor keys; wrap; mouse (X10, buttons, drag, all, focus, UTF-8, SGR, urxvt, pixels); cursor; paste; screens last.
_KNOWN = (1, 7, 9, 1000, 1001, 1002, 1003, 1004, 1005, 1006, 1015, 1016, 25, 2004, 47, 1047, 1049)


class TerminalModes:
    """Invariant: `_changed` are the known modes that are not as a terminal has them by default."""

    def __init__(self) -> None:
        self._changed: set[int] = set()
        self._has_keypad = False
        self._cut = b""

    def feed(self, data: bytes) -> None:
        """Takes output that the terminal gets, cut anywhere."""
        if self._cut:
            data, self._cut = self._cut + data, b""
        if b"\x1b" not in data:
            return
        words = data.split(b"\x1b")[1:]
        for word in words:
            self._take(word[:SEQUENCE_BYTES_MAX])
        if len(words[-1]) < SEQUENCE_BYTES_MAX and _is_cut(words[-1]):
            self._cut = b"\x1b" + words[-1]

    def render_reset(self) -> bytes:
        """What makes the terminal as it was; nothing where nothing was changed."""
        words = [
            b"\x1b[?%d%c" % (number, b"h" if number in _ON else b"l") for number in _KNOWN if number in self._changed
        ]
        if self._has_keypad:
            words.append(b"\x1b>")
        # Colours do no harm, and none is kept in mind: what changes a mode changes them as well.
        return b"\x1b[0m" + b"".join(words) if words else b""

    def _take(self, word: bytes) -> None:
        """Takes what follows an escape."""
        if word.startswith(b"[?"):
            rest = word[2:].lstrip(_DIGITS)
            if rest[:1] in (b"h", b"l"):
                for number in word[2 : len(word) - len(rest)].split(b";"):
                    if number and int(number) in _KNOWN:
                        self._set(int(number), is_on=rest[:1] == b"h")
        elif word[:1] in (b"=", b">", b"c"):
            self._has_keypad = word[:1] == b"="
            # A full reset.
            if word[:1] == b"c":
                self._changed.clear()

    def _set(self, number: int, *, is_on: bool) -> None:
        if is_on == (number in _ON):
            self._changed.discard(number)
        else:
            self._changed.add(number)


def _is_cut(word: bytes) -> bool:
    """Whether what follows an escape is only the beginning of such a sequence."""
    return word in (b"", b"[") or (word.startswith(b"[?") and not word[2:].lstrip(_DIGITS))
