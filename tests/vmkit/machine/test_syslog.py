"""The records of a guest's log as a person sees them: one line each, whatever the guest wrote."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.errors import ConfigError
from vmkit.machine.launch import Layout
from vmkit.machine.running import read_log
from vmkit.machine.syslog import Choice, escape, join_files, parse_level, parse_pattern, parse_since, render_record
from vmkit.monitor.logs import CappedLog

RECORD: dict[str, object] = {
    "t": 1000.0,
    "time": 1_700_000_000.25,
    "priority": "err",
    "ident": "app",
    "pid": 7,
    "uid": 0,
    "text": "hello",
}


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    import time  # noqa: PLC0415 - for tzset() alone

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, "2023-11-14 22:13:20.250 err    app[7]: hello"),
        ({"uid": 1000}, "2023-11-14 22:13:20.250 err    app[7] uid=1000: hello"),
        ({"pid": None, "uid": None, "ident": "kernel"}, "2023-11-14 22:13:20.250 err    kernel: hello"),
        ({"ident": "", "cut": True}, "2023-11-14 22:13:20.250 err    -[7]: hello ..."),
        ({"text": "a\nb\r\x1b[31m\u202e"}, "2023-11-14 22:13:20.250 err    app[7]: a\\nb\\r\\x1b[31m\\u202e"),
        ({"time": 1e300}, "????-??-?? ??:??:??.??? err    app[7]: hello"),
        ({"time": None}, "????-??-?? ??:??:??.??? err    app[7]: hello"),
    ],
)
def test_record_is_one_line(change: dict[str, object], line: str) -> None:
    assert render_record({**RECORD, **change}) == line


@given(st.text(), st.text())
def test_no_text_of_a_guest_begins_another_line_or_steers_a_terminal(ident: str, text: str) -> None:
    line = render_record({**RECORD, "ident": ident, "text": text})
    assert len(line.splitlines()) == 1
    assert all(letter.isprintable() or letter == "\t" for letter in line)


@pytest.mark.parametrize("has_opened", [False, True])
def test_file_that_rolls_over_while_it_is_read_is_read_once(tmp_path: Path, has_opened: bool) -> None:
    log = CappedLog(tmp_path / Layout.SYSLOG, ceiling_bytes=10)
    log.write(b"first\n")

    def read() -> Iterator[bytes]:
        """Reads as slowly as can be."""
        if not has_opened:
            log.write(b"second\n")
        pieces = read_log(tmp_path, "syslog")
        first = next(pieces)
        if has_opened:
            log.write(b"second\n")
        yield first
        yield from pieces

    found = b"".join(join_files(tmp_path, read()))
    log.close()
    assert found == (b"first\n" if has_opened else b"first\nsecond\n")


def test_escapes_keep_what_can_be_printed() -> None:
    assert escape("tab\tpunkt: äöü €") == "tab\tpunkt: äöü €"


def test_records_are_chosen_by_time_priority_and_text() -> None:
    assert Choice().is_wanted(RECORD)
    assert Choice(since_s=1000, level=3, pattern=re.compile("app: h")).is_wanted(RECORD)
    assert not Choice(since_s=1000.5).is_wanted(RECORD)
    assert not Choice(level=2).is_wanted(RECORD)
    assert not Choice(pattern=re.compile("^hello")).is_wanted(RECORD)
    assert not Choice().is_wanted({**RECORD, "t": "yesterday"})


@pytest.mark.parametrize(
    ("text", "since_s"), [("30s", 970), ("10m", 400), ("0h", 1000), ("1970-01-01 00:10", 600), ("1970-01-01", 0)]
)
def test_time_is_an_age_or_a_date(text: str, since_s: float) -> None:
    assert parse_since(text, 1000.0) == since_s


def test_time_with_a_zone_is_of_that_zone() -> None:
    assert parse_since("1970-01-01T02:00:00+01:00", 0) == datetime(1970, 1, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize("text", ["", "10", "m", "10 m", "yesterday", "-5m", "9999999999s", "1970-13-01"])
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="--since must be a time such as 10m, 2h or '2026-11-30 12:00', not '"):
        parse_since(text, 1000.0)


@pytest.mark.parametrize(
    ("text", "level"), [("emerg", 0), ("err", 3), ("ERROR", 3), ("warning", 4), ("debug", 7), ("0", 0), ("7", 7)]
)
def test_priority_is_a_name_or_a_number(text: str, level: int) -> None:
    assert parse_level(text) == level


@pytest.mark.parametrize("text", ["", "8", "-1", "loud", "٣"])
def test_what_is_no_priority_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--priority must be one of emerg, .*, debug, not '"):
        parse_level(text)


def test_what_is_no_regular_expression_is_told() -> None:
    assert parse_pattern("a.c").search("abc")
    with pytest.raises(ConfigError, match=r"--grep must be a regular expression, not '\(': "):
        parse_pattern("(")
