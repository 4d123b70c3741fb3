"""`vmkit ktap`: what it prints, its report, and its three statuses."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest

from tests.vmkit.cli.conftest import DEADLINE_S, Program, Vmkit
from tests.vsh.live import wait_until

GOOD = "TAP version 13\n1..2\nok 1 a\nok 2 b # SKIP no\n"
HUNG = "KTAP version 1\n1..3\n# what a says\nnot ok 1 a # exit=1\nok 2 b\n\x1b[2Jc begins\n"


def test_all_tests_passed(vmkit: Vmkit, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(GOOD)
    done = vmkit("ktap", str(tmp_path / "log"))
    assert (done.status, done.out, done.err) == (0, "2 tests: 1 passed, 1 skipped\n", "")


def test_output_that_breaks_off_has_every_test_that_was_planned(vmkit: Vmkit, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(HUNG)
    junit = tmp_path / "reports" / "junit.xml"
    done = vmkit("ktap", str(tmp_path / "log"), "--junit", str(junit))
    assert done.status == 1
    assert done.out.splitlines() == [
        "failed: a: exit=1",
        "error: test 3: was running when the output ended",
        "3 tests: 1 passed, 1 failed, 1 error",
    ]
    suite = Xml.parse(junit).getroot()[0]
    assert [(case.get("classname"), case.get("name")) for case in suite] == [
        ("ktap", "a"), ("ktap", "b"), ("ktap", "test 3")
    ]  # fmt: skip
    assert (suite[0][0].tag, suite[0][0].text) == ("failure", "# what a says")
    # No report steers the terminal of its reader.
    assert (suite[2][0].tag, suite[2][0].text) == ("error", "c begins")
    assert vmkit("ktap", "--quiet", str(tmp_path / "log")).out == "3 tests: 1 passed, 1 failed, 1 error\n"


def test_long_list_of_failures_is_cut_for_a_person(vmkit: Vmkit, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("KTAP version 1\n1..500\n")
    out = vmkit("ktap", str(tmp_path / "log")).out.splitlines()
    assert len(out) == 102
    assert out[-2:] == ["and 400 more", "500 tests: 500 errors"]


def test_output_comes_through_a_pipe(program: Program) -> None:
    done = program("ktap", "-", input=GOOD.encode())
    assert (done.returncode, done.stdout) == (0, b"2 tests: 1 passed, 1 skipped\n")
    done = program("ktap", "-", input=b"")
    assert done.returncode == 2
    assert b"found no test results in standard input" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ktap",), "Missing argument 'FILE'"),
        (("ktap", "--bogus", "x"), "No such option '--bogus'"),
        (("ktap", "a", "b"), "unexpected extra argument"),
        (("ktap", "/nonexistent"), "cannot read /nonexistent: No such file or directory"),
        (("ktap", "/"), "cannot read /: Is a directory"),
        (("ktap", "/dev/null"), "found no test results in /dev/null"),
    ],
)
def test_what_cannot_be_judged_is_no_failed_test(vmkit: Vmkit, words: tuple[str, ...], message: str) -> None:
    done = vmkit(*words)
    assert (done.status, done.out) == (2, "")
    assert message in done.err


def test_report_that_cannot_be_written(vmkit: Vmkit, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(GOOD)
    done = vmkit("ktap", str(tmp_path / "log"), "--junit", "/dev/null/x")
    assert done.status == 2
    assert "cannot write the report /dev/null/x: File exists" in done.err


def test_reader_that_goes_away_is_no_traceback(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("KTAP version 1\n1..90000\n")
    words = [sys.executable, "-m", "vmkit", "ktap", str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(DEADLINE_S)


@contextlib.contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for fd in ends:
            os.close(fd)


def test_interruption_is_the_end_of_the_output(folders: Path, tmp_path: Path) -> None:
    """As a CI system cancels a job whose machine hangs."""
    junit = tmp_path / "junit.xml"
    argv = [sys.executable, "-m", "vmkit", "ktap", "-", "--junit", str(junit)]
    with (
        open_pipe() as (source, sink),
        subprocess.Popen(argv, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
    ):
        os.write(sink, b"KTAP version 1\n1..2\nok 1 a\n")
        # Once the output is taken, a signal comes before or behind its reading, and never amid.
        wait_until(lambda: not select.select([source], [], [], 0)[0], "the output is taken")
        process.terminate()
        out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (128 + signal.SIGTERM, b"")
    assert out == (b"error: test 2: was running when the output ended: interrupted\n2 tests: 1 passed, 1 error\n")
    assert len(Xml.parse(junit).getroot()[0]) == 2
