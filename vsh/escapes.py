"""The escapes of an interactive session: vsh takes what a person types after `~` at the start of a line."""

ESCAPE = ord("~")
CTRL_Z = 0x1A
_LINE_ENDS = b"\r\n"
_ESC = 0x1B
# How answers of a terminal end that are no keys' (ECMA-48 8.3: CPR, DA, DSR; xterm: focus, DECRPM).
_ANSWER_ENDS = b"RcnIOty"
_PARAMETERS = b"0123456789;?>$"

HELP = """\
Supported escape sequences:
  ~.   disconnect; what runs in the terminal is hung up
  ~^Z  suspend vsh
  ~?   this message
  ~~   send the escape character
(Escapes are recognised at the beginning of a line only.)
"""

# What a keystroke asked vsh for.
DISCONNECT, SUSPEND, SHOW_HELP = "disconnect", "suspend", "help"

_COMMANDS = {ord("."): DISCONNECT, CTRL_Z: SUSPEND, ord("?"): SHOW_HELP}


class EscapeFilter:
    """Splits typed bytes into bytes for the target and commands for vsh.

    Invariant: `_is_pending` means that a `~` at a line's start is held back. `_answer` is the part of a terminal's
    answer that has come. Such an answer is not typed: busybox's shell asks for the cursor's position at each prompt, so
    an answer comes at the start of every line.
    """

    __slots__ = ("_answer", "_at_line_start", "_is_pending")

    def __init__(self) -> None:
        self._at_line_start = True
        self._is_pending = False
        self._answer = b""

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        """Returns the bytes for the target, and the commands in the order they were typed."""
        if not self._is_pending and not self._at_line_start and ESCAPE not in data:
            self._at_line_start = data[-1:] in (b"\r", b"\n")
            return data, []
        out = bytearray()
        commands: list[str] = []
        for byte in data:
            if self._is_pending:
                self._is_pending = False
                if byte in _COMMANDS:
                    commands.append(_COMMANDS[byte])
                    self._at_line_start = True
                    continue
                self._at_line_start = False
                if byte != ESCAPE:
                    out.append(ESCAPE)
            elif byte == ESCAPE and self._at_line_start and not self._answer:
                self._is_pending = True
                continue
            out.append(byte)
            self._at_line_start = (self._at_line_start and self._is_answer(byte)) or byte in _LINE_ENDS
        return bytes(out), commands

    def _is_answer(self, byte: int) -> bool:
        """Whether this byte, first on its line or behind others of an answer, can be part of a terminal's answer."""
        if not self._answer:
            self._answer = b"\x1b" if byte == _ESC else b""
            return byte == _ESC
        if self._answer == b"\x1b":
            self._answer = b"\x1b[" if byte == ord("[") else b""
            return byte == ord("[")
        if byte in _PARAMETERS:
            return True
        self._answer = b""
        return byte in _ANSWER_ENDS
