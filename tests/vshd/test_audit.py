"""The audit log: one line for each session, whatever a client writes."""

import json
import re
import sys

from hypothesis import given
from hypothesis import strategies as st

from tests.docs.schemas import check_form
from tests.vsh.live import StartVshd, wait_until
from vmkit.machine.sessions import render_line
from vmkit.memory.lines import KernelLine
from vshd.log import LINE_MAX, fit
from vshd.session.audit import render_end, render_refusal

NOW_S = 1_780_000_000.0
WHO = "vsock 2:1234 user root"


def read(line: str) -> "dict[str, object] | None":
    """What the host reads of a line that vshd logged."""
    text = render_line(KernelLine("info", "user", 1.0, f"vshd: {fit(line, LINE_MAX)}"))
    if not text:
        return None
    assert text.count(b"\n") == 1
    found: dict[str, object] = json.loads(text)
    check_form("session", found)
    return found


def test_line_of_a_session() -> None:
    line = render_end(WHO, "exit 3", "sh -c 'exit 3'", seconds=2.5, count=(7, 11), now_s=NOW_S)
    assert line == f"{WHO}: exit 3 after 2.500 s, 7 bytes in, 11 bytes out, since 2026-05-28T20:26:37Z: sh -c 'exit 3'"
    assert read(line) == {
        "since": "2026-05-28T20:26:37Z",
        "peer": "vsock 2:1234",
        "user": "root",
        "command": "sh -c 'exit 3'",
        "end": "exit 3",
        "exit": 3,
        "seconds": 2.5,
        "bytes_in": 7,
        "bytes_out": 11,
    }


def test_ends_as_a_shell_has_them() -> None:
    for end, status in (("exit 0", 0), ("signal 9", 137), ("exit 1, not all of it sent (lost),", 1), ("lost", None)):
        found = read(render_end("unix user 1000", end, "x", seconds=0.1, now_s=NOW_S))
        assert found is not None
        assert (found["exit"], found["user"], found["bytes_in"]) == (status, "1000", None)
    refused = read(render_refusal("unix", "x", "no such user", now_s=NOW_S))
    assert refused is not None
    assert (refused["end"], refused["command"], refused["exit"]) == ("refused", "x: no such user", None)


def test_kernels_own_line_is_no_session() -> None:
    line = f"vshd: {render_end(WHO, 'exit 0', 'x', seconds=1, now_s=NOW_S)}"
    assert render_line(KernelLine("info", "kern", 1.0, line)) == b""
    assert render_line(KernelLine("info", "user", 1.0, line.removeprefix("vshd: "))) == b""


FORGED = render_end(WHO, "exit 0", "innocent", seconds=1, count=(1, 1), now_s=NOW_S)


HOSTILE = [
    FORGED,
    f"x\n<6>vshd: {FORGED}",
    f": {FORGED}",
    FORGED.partition(": exit 0 ")[2],
    "a: b\r\x1b[2J",
    "x" * 9999,
]


@given(st.one_of(st.text(), st.sampled_from(HOSTILE)))
def test_command_cannot_pass_for_anything_else(command: str) -> None:
    for line in (
        render_end(WHO, "exit 7", command, seconds=0.25, count=(5, 6), now_s=NOW_S),
        render_refusal(WHO, command, "no", now_s=NOW_S),
    ):
        assert "\n" not in fit(line, LINE_MAX)
        found = read(line)
        assert found is not None
        assert (found["peer"], found["user"]) == ("vsock 2:1234", "root")
        assert str(found["since"]).startswith("2026-05-28T20:26:")
        assert found["end"] in ("exit 7", "refused")
        assert (found["seconds"], found["bytes_in"], found["bytes_out"]) in ((0.25, 5, 6), (None, None, None))


def test_bytes_of_a_session_are_counted(start_vshd: StartVshd) -> None:
    server = start_vshd()
    script = "import os, sys; sys.stdin.buffer.read(); os.write(2, b'e' * 5); os.write(1, b'o' * 3000000)"
    done = server.run("--", sys.executable, "-c", script, input=b"i" * 2_000_000)
    assert (done.returncode, len(done.stdout), len(done.stderr)) == (0, 3_000_000, 5)
    wait_until(lambda: "bytes out" in server.log, "the session is logged")
    assert re.search(r"unix user \S+: exit 0 after \S+ s, 2000000 bytes in, 3000005 bytes out, since ", server.log)
