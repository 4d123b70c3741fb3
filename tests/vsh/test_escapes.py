"""Escapes: what is typed after `~` at the start of a line."""

import pytest

from vsh.escapes import DISCONNECT, SHOW_HELP, SUSPEND, EscapeFilter


@pytest.mark.parametrize(
    ("typed", "sent", "commands"),
    [
        (b"hello", b"hello", []),
        (b"~.", b"", [DISCONNECT]),
        (b"~\x1a", b"", [SUSPEND]),
        (b"~?", b"", [SHOW_HELP]),
        (b"~~", b"~", []),
        (b"~~.", b"~.", []),
        (b"~x", b"~x", []),
        (b"a~.", b"a~.", []),
        (b"a\r~.", b"a\r", [DISCONNECT]),
        (b"a\n~?b", b"a\nb", [SHOW_HELP]),
        (b"~?~.", b"", [SHOW_HELP, DISCONNECT]),
        (b"ls ~/x\r", b"ls ~/x\r", []),
        (b"~\r~.", b"~\r", [DISCONNECT]),
        (b"\x1b[A~.", b"\x1b[A~.", []),
        (b"~", b"", []),
        # A terminal's answers: cursor position, attributes, focus.
        (b"\x1b[24;1R~.", b"\x1b[24;1R", [DISCONNECT]),
        (b"ls\r\x1b[24;1R~\x1a", b"ls\r\x1b[24;1R", [SUSPEND]),
        (b"\x1b[?62;22c\x1b[I~?", b"\x1b[?62;22c\x1b[I", [SHOW_HELP]),
        (b"a\x1b[24;1R~.", b"a\x1b[24;1R~.", []),
        # Keys: Delete, Page Down, F3, Esc, Alt-x.
        (b"\x1b[3~.", b"\x1b[3~.", []),
        (b"\x1b[6~~.", b"\x1b[6~~.", []),
        (b"\x1bOR~.", b"\x1bOR~.", []),
        (b"\x1b~.", b"\x1b~.", []),
        (b"\x1bx~.", b"\x1bx~.", []),
        (b"\x1b[\r~.", b"\x1b[\r", [DISCONNECT]),
        (b"~\x1b[24;1R~.", b"~\x1b[24;1R~.", []),
    ],
)
def test_escapes_whole_and_byte_by_byte(typed: bytes, sent: bytes, commands: list[str]) -> None:
    assert EscapeFilter().feed(typed) == (sent, commands)
    escapes = EscapeFilter()
    results = [escapes.feed(bytes([byte])) for byte in typed]
    assert b"".join(data for data, _ in results) == sent
    assert [command for _, found in results for command in found] == commands


def test_held_back_escape_is_sent_with_what_follows() -> None:
    escapes = EscapeFilter()
    assert escapes.feed(b"~") == (b"", [])
    assert escapes.feed(b"x") == (b"~x", [])
