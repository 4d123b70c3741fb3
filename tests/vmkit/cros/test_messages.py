"""Our messages of ChromeOS's host against the .proto file, read by Google's protobuf, and the notes made of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vmkit.cros.google import CLASSES, METHODS, make_request
from vmkit.cros.messages import COLLECT_KERNEL_LOGS, COLLECT_USER_LOGS, VM_READY, LogRequest, SentRecord
from vmkit.cros.notes import LINE, make_line
from vmkit.maitred.messages import Timestamp
from vmkit.monitor.lines import parse_record
from vshd.carry.records import IS_CUT, SYSLOG, TEXT_MAX, LogRecord

NOW_NS = 77


def test_methods_are_those_of_the_file() -> None:
    logs = ("LogRequest", "EmptyMessage")
    ready = ("EmptyMessage", "EmptyMessage")
    assert {"CollectKernelLogs": logs, "CollectUserLogs": logs, "VmReady": ready} == METHODS
    paths = (COLLECT_KERNEL_LOGS, COLLECT_USER_LOGS, VM_READY)
    assert {path.rpartition("/")[2] for path in paths} == set(METHODS)


RECORDS = st.fixed_dictionaries(
    {"severity": st.integers(0, 8), "content": st.binary(max_size=40)}, optional={"time": st.integers(0, 2**40)}
)


@given(st.lists(RECORDS, max_size=5))
def test_request_of_googles_codec_is_read(records: list[dict[str, int | bytes]]) -> None:
    theirs = make_request(*records)
    ours = LogRequest()
    ours.merge(theirs.SerializeToString())
    read = ours.read_records()
    assert [(record.severity, record.content) for record in read] == [
        (record["severity"], record["content"]) for record in records
    ]
    times = [record.timestamp.seconds * 10**9 + record.timestamp.nanos if record.timestamp else None for record in read]
    assert times == [record.get("time") for record in records]
    assert CLASSES["LogRequest"].FromString(ours.encode()) == theirs
    for record, mine in zip(theirs.records, read, strict=True):
        assert CLASSES["LogRecord"].FromString(mine.encode()) == record


@pytest.mark.parametrize(
    ("severity", "content", "shown"),
    [
        (4, b" app[12]: it failed", ("err", "app", 12, "it failed")),
        (1, b"app: it burns", ("emerg", "app", None, "it burns")),
        (0, b"no name", ("notice", "", None, "no name")),
        (9, b"x: y", ("notice", "x", None, "y")),
        (-1, b"<0>kernel: forged", ("notice", "", None, "<0>kernel: forged")),
    ],
)
def test_record_is_a_line_as_a_program_writes_it(
    severity: int, content: bytes, shown: tuple[str, str, int | None, str]
) -> None:
    note = make_line(SentRecord(severity, Timestamp(5, 6), content), NOW_NS)
    assert (note.source, note.time_ns) == (LINE, 5_000_000_006)
    value = parse_record(LogRecord(SYSLOG, 0, note.text))
    assert (value["facility"], value["pid"], value["uid"]) == ("user", None, None)
    assert (value["priority"], value["ident"], value.get("claimed_pid"), value["text"]) == shown


@pytest.mark.parametrize("time", [None, Timestamp(0, 5), Timestamp(1 << 63, 0), Timestamp(5, -1), Timestamp(5, 10**9)])
def test_time_that_cannot_be_is_the_hosts(time: Timestamp | None) -> None:
    assert make_line(SentRecord(7, time, b"x"), NOW_NS).time_ns == NOW_NS


def test_long_line_is_cut() -> None:
    note = make_line(SentRecord(7, None, b"x" * TEXT_MAX), NOW_NS)
    assert (len(note.text), note.flags) == (TEXT_MAX, IS_CUT)
