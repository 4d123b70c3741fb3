"""How vmkit speaks: progress in a terminal and elsewhere, tables in a pipe, text that is no markup."""

import os
import pty
import subprocess
import sys

import pytest

from vmkit.cli.show import open_lines, open_progress, print_json, print_table

ODD = "[/nope] [red]x :smile: \\[ ä"


def test_progress_elsewhere_is_one_line_for_each_new_text(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(quiet=False) as tell:
        for text, fraction in (("a", None), ("a", None), ("b", None), ("c", 0.5), ("a", None)):
            tell(text, fraction)
    assert capsys.readouterr() == ("", "vmkit: a\nvmkit: b\nvmkit: a\n")


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(quiet=True) as tell:
        tell("a", None)
    assert capsys.readouterr() == ("", "")


LINES = """
from vmkit.cli.show import open_lines
with open_lines(quiet=False) as lines:
    for number in range(3):
        lines.add(f"[cell] {number} done")
        lines.tell(f"{number + 1} of 3 cells", (number + 1) / 3)
"""


def read_terminal(ours: int) -> bytes:
    """All that is written to a terminal until its last writer has gone."""
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            return seen
        if not data:
            return seen
        seen += data


def test_lines_of_many_things_stay_in_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LC_ALL": "C.UTF-8"}
    with subprocess.Popen([sys.executable, "-c", LINES], stdin=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        seen = read_terminal(ours).decode()
    os.close(ours)
    assert process.returncode == 0
    # What changes was there, and is gone at the end.
    assert "of 3 cells" in seen
    assert [f"[cell] {number} done\r\n" in seen for number in range(3)] == [True] * 3


def test_lines_of_many_things_in_a_log_are_those_that_stay(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with open_lines(quiet=quiet) as lines:
            lines.tell("2 machines", None)
            lines.add("one done")
            lines.tell("1 of 2", 0.5)
    assert capsys.readouterr() == ("", "vmkit: 2 machines\nvmkit: one done\n")


SCRIPT = """
import sys, time
from vmkit.cli.show import open_progress
with open_progress(quiet=False) as tell:
    tell(sys.argv[1], None)
    time.sleep(0.3)
    tell(sys.argv[1], 0.5)
    time.sleep(0.3)
print("answer")
"""


@pytest.mark.parametrize("environ", [{"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}])
def test_progress_in_a_terminal_shows_any_text_and_leaves_no_trace(environ: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "[/nope] [red]x"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", **environ},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        seen += data
    out, _ = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == 0
    assert out == b"answer\n"
    assert b"Traceback" not in seen
    assert b"\\u28" not in seen, "a spinner that the terminal cannot draw"
    if environ.get("TERM") != "dumb":
        assert b"[/nope] [red]x" in seen


def test_table_shows_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "B"), [(ODD, "2"), ("x" * 200, "3")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["A", "B"]
    assert lines[1].startswith(ODD)
    assert lines[2].split() == ["x" * 200, "3"]


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1, None]})
    assert capsys.readouterr().out == '{\n  "a": [\n    1,\n    null\n  ]\n}\n'
