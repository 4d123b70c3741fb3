"""What the lines of a guest's log say: those of real programs, and those of nobody."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.monitor.lines import parse_record
from vshd.carry.records import FIELDS, HAS_WRITER, IS_CUT, KERNEL, SYSLOG, LogRecord

READ = ("facility", "priority", "ident", "text")


def parse(text: bytes, source: int = SYSLOG) -> tuple[object, ...]:
    value = parse_record(LogRecord(source, 1, text))
    return tuple(value[key] for key in READ)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        # logger of busybox, logger of util-linux, syslog(3) with LOG_PID, vshd, a kernel's message as rsyslog has it.
        (b"<13>Nov 30 12:00:00 root: hello", ("user", "notice", "root", "hello")),
        (b"<13>Nov  1 12:00:00 root[12]: a: b: c\n", ("user", "notice", "root", "a: b: c")),
        (b"<86>Nov 30 12:00:00 sshd[812]: x\0", ("authpriv", "info", "sshd", "x")),
        (b"<30>vshd[1]: vshd started", ("daemon", "info", "vshd", "vshd started")),
        # logger --rfc5424
        (
            b'<27>1 2026-11-30T12:00:00.1+00:00 host app 77 ID [a@1 k="v\\"]"][b] \xef\xbb\xbftext: x',
            ("daemon", "err", "app", "text: x"),
        ),
        (b"<27>1 2026-11-30T12:00:00Z host - - - -", ("daemon", "err", "", "")),
        # rsyslog's, when it sends lines on: the traditional form, and the other one.
        (b"<13>Nov 30 12:00:00 web app[7]: text", ("user", "notice", "app", "text")),
        (b"<13>2026-11-30T12:00:00.123456+01:00 web app: text", ("user", "notice", "app", "text")),
        # No syslog line, but a line.
        (b"hello", ("user", "notice", "", "hello")),
        (b"", ("user", "notice", "", "")),
        (b"<999>hello", ("user", "notice", "", "<999>hello")),
        (b"<192>x: y", ("user", "notice", "", "<192>x: y")),
        (b"<191>x:y", ("23", "debug", "x", "y")),
        (b"<14>not a name: x", ("user", "info", "", "not a name: x")),
        (b"<14>" + b"n" * 65 + b": x", ("user", "info", "", "n" * 65 + ": x")),
        (b"<14>app: \xff\xfe", ("user", "info", "app", "\ufffd\ufffd")),
        (b"<14>app: two\nlines", ("user", "info", "app", "two\nlines")),
    ],
)
def test_line_of_a_program_is_read(text: bytes, read: tuple[str, ...]) -> None:
    assert parse(text) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (b"6,339,5140900,-;Linux version 6.12\n", ("kern", "info", "kernel", "Linux version 6.12")),
        (b"3,1,2,-,caller=T1;oops: bad\n SUBSYSTEM=pci\n", ("kern", "err", "kernel", "oops: bad")),
        (b"30,1,2,c;vshd: started\n", ("daemon", "info", "vshd", "started")),
        (b"12,1,2,-;systemd[1]: x\n", ("user", "warn", "systemd", "x")),
        (b"noise", ("user", "notice", "", "noise")),
    ],
)
def test_record_of_the_kernel_is_read(text: bytes, read: tuple[str, ...]) -> None:
    assert parse(text, KERNEL) == read


def test_name_of_a_host_in_a_line_is_kept_apart() -> None:
    texts = (b"<13>Nov 30 12:00:00 web app: x", b"<13>Nov 30 12:00:00 app: web x: y", b"<13>web app: x")
    values = [parse_record(LogRecord(SYSLOG, 1, text)) for text in texts]
    assert [(value.get("host"), value["ident"], value["text"]) for value in values] == [
        ("web", "app", "x"),
        (None, "app", "web x: y"),
        (None, "", "web app: x"),
    ]


@pytest.mark.parametrize(
    ("text", "read", "unit"),
    [
        (b"30\0a.service\0app\0" + b"0\0two\nlines\n", ("daemon", "info", "app", "two\nlines"), "a.service"),
        (b"14\0\0app: x[1]\0" + b"0\0<0>kernel: x", ("user", "info", "app: x[1]", "<0>kernel: x"), None),
        (b"14\0\0\0" + b"0\0", ("user", "info", "", ""), None),
        # The collector makes none of these.
        (b"192\0u\0app\0" + b"0\0x", ("user", "notice", "", "192\0u\0app\0" + "0\0x"), None),
        (b"30\0u\0x", ("user", "notice", "", "30\0u\0x"), None),
    ],
)
def test_record_of_the_journal_is_read(text: bytes, read: tuple[str, ...], unit: str | None) -> None:
    assert parse(text, FIELDS) == read
    assert parse_record(LogRecord(FIELDS, 1, text)).get("unit") == unit


def test_writer_is_the_kernels_word_and_the_lines_own_is_a_claim() -> None:
    text = b"<14>sshd[1]: x"
    value = parse_record(LogRecord(SYSLOG, 1, text, flags=HAS_WRITER | IS_CUT, pid=77, uid=1000, gid=5))
    shown = {key: value.get(key) for key in ("ident", "pid", "uid", "gid", "claimed_pid", "cut")}
    assert shown == {"ident": "sshd", "pid": 77, "uid": 1000, "gid": 5, "claimed_pid": 1, "cut": True}
    unknown = parse_record(LogRecord(SYSLOG, 1, text))
    assert (unknown["pid"], unknown["uid"], unknown["claimed_pid"]) == (None, None, 1)


@given(st.integers(0, 255), st.integers(0, 255), st.binary(max_size=300), st.integers(0, 2**64 - 1))
def test_every_record_is_read(source: int, flags: int, text: bytes, time_ns: int) -> None:
    for start in (b"", b"<14>", b"<14>1 ", b"6,1,1,-;", b"6\0u\0n\0" + b"1\0"):
        value = parse_record(LogRecord(source, 0, start + text, flags=flags, time_ns=time_ns))
        assert value["text"] is not None
