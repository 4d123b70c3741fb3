"""The sessions of a machine out of a kernel's log that is read once, or again and again."""

import json

from vmkit.machine.sessions import SessionFollower, find_beginning, render_sessions
from vshd.session.audit import render_end


def make_log(*numbers: int, level: int = 14) -> bytes:
    """A log with a kernel's line and a session for each number."""
    lines = []
    for number in numbers:
        end = render_end("vsock 2:9 user root", "exit 0", f"echo {number}", seconds=0.1, now_s=1_780_000_000)
        lines.append(f"<6>[{number:5d}.000000] random: crng init done\n")
        lines.append(f"<{level}>[{number:5d}.500000] vshd: {end}\n")
    return "".join(lines).encode()


def find_commands(pieces: bytes) -> list[str]:
    return [json.loads(line)["command"] for line in pieces.splitlines()]


def test_log_has_its_sessions_in_order() -> None:
    assert find_commands(render_sessions(make_log(0, 1, 2))) == ["echo 0", "echo 1", "echo 2"]
    assert render_sessions(b"no log\n\xff") == b""
    assert render_sessions(make_log(0, level=6)) == b""


def test_beginning_that_is_lost_is_found() -> None:
    assert find_beginning(make_log(0, 1)) == 0.0
    assert find_beginning(make_log(7, 8)) == 7.0
    assert find_beginning(b"") == 0.0


def test_each_session_is_followed_once() -> None:
    follower = SessionFollower()
    logs = [make_log(0), make_log(0), make_log(0, 1, 2), b"", make_log(1, 2, 3), make_log(9)]
    seen = [find_commands(b"".join(follower.take(log))) for log in logs]
    assert seen == [["echo 0"], [], ["echo 1", "echo 2"], [], ["echo 3"], ["echo 9"]]
