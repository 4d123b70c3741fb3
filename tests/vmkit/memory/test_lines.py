"""The kernel's log as lines, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmkit.memory.lines import MAX_LOG_BYTES, KernelLine, parse_lines, render_records, strip_levels
from vmkit.memory.ring import PrintkRecord

records = st.builds(
    PrintkRecord,
    level=st.integers(0, 7),
    facility=st.integers(0, 255),
    time_ns=st.integers(0, (1 << 64) - 1),
    text=st.binary(max_size=40),
)


def test_lines_are_those_of_dmesg() -> None:
    log = render_records(
        [PrintkRecord(5, 0, 0, b"Linux version 6.12"), PrintkRecord(6, 1, 12_345_678_901, b"one\ntwo")]
    )
    assert log == b"<5>[    0.000000] Linux version 6.12\n<14>[   12.345678] one\n<14>[   12.345678] two\n"
    assert strip_levels(log) == b"[    0.000000] Linux version 6.12\n[   12.345678] one\n[   12.345678] two\n"
    assert list(parse_lines(log)) == [
        KernelLine("notice", "kern", 0.0, "Linux version 6.12"),
        KernelLine("info", "user", 12.345678, "one"),
        KernelLine("info", "user", 12.345678, "two"),
    ]


@given(st.lists(records, max_size=8))
@settings(deadline=None)
def test_each_line_of_a_record_is_read_back(given_records: list[PrintkRecord]) -> None:
    texts = [line for record in given_records for line in record.text.split(b"\n")]
    lines = list(parse_lines(render_records(given_records)))
    assert [line.text for line in lines] == [text.decode(errors="replace") for text in texts]


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_parsed_and_stripped(data: bytes) -> None:
    list(parse_lines(data))
    strip_levels(data)


def test_text_forges_no_line_of_another_level() -> None:
    (first, second) = parse_lines(render_records([PrintkRecord(6, 0, 0, b"x\n<0>[    9.000000] forged")]))
    assert (first.level, second.level) == ("info", "info")
    assert second.text == "<0>[    9.000000] forged"


@pytest.mark.parametrize("text", [b"x" * 65535, b"\n" * 65535])
def test_log_has_a_ceiling_and_keeps_the_newest(text: bytes) -> None:
    log = render_records([*(PrintkRecord(6, 0, 0, text) for _ in range(200)), PrintkRecord(6, 0, 0, b"the last")])
    assert len(log) <= MAX_LOG_BYTES
    assert log.endswith(b"] the last\n")
