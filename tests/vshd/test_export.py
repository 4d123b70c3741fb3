"""Records of systemd's journal in its export format: what of them the log keeps, whole, in pieces, and too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vshd.carry.records import FIELDS, HAS_WRITER, HEADER, IS_CUT, TEXT_MAX
from vshd.syslog.export import LINE_MAX, VALUE_MAX, ExportReader, add_record

NOW_NS = 5_000
# What journald of systemd 257 sends for `systemd-run --unit=job printf 'a\nb'`, some fields left out.
RECORD = (
    b"_TRANSPORT=stdout\nPRIORITY=6\nSYSLOG_FACILITY=3\nSYSLOG_IDENTIFIER=printf\n"
    b"MESSAGE\n\x03\0\0\0\0\0\0\0a\nb\n_PID=77\n_UID=1000\n_GID=5\n_COMM=printf\n_SYSTEMD_UNIT=job.service\n"
    b"__REALTIME_TIMESTAMP=1700000000000001\n__MONOTONIC_TIMESTAMP=5\n\n"
)
Added = tuple[int, int, int, tuple[int, int, int], bytes]


def collect(*pieces: bytes) -> list[Added]:
    reader = ExportReader()
    added: list[Added] = []
    for piece in pieces:
        for fields in reader.feed(piece):
            add_record(lambda *record: added.append(record), fields, NOW_NS)
    return added


def find_texts(*pieces: bytes) -> list[bytes]:
    return [text.rpartition(b"\0")[2] for *_, text in collect(*pieces)]


def test_record_becomes_one_of_the_log() -> None:
    (record,) = collect(RECORD)
    text = b"30\0job.service\0printf\x000\0a\nb"
    assert record == (FIELDS, HAS_WRITER, 1_700_000_000_000_001_000, (77, 1000, 5), text)


def test_record_in_pieces_is_the_same() -> None:
    stream = RECORD * 2
    assert collect(*(stream[at : at + 1] for at in range(len(stream)))) == collect(stream) == collect(RECORD) * 2
    for at in range(len(RECORD)):
        assert collect(RECORD[:at], RECORD[at:]) == collect(RECORD)


def test_record_without_what_the_journal_usually_knows() -> None:
    assert collect(b"MESSAGE=x\n\n") == [(FIELDS, 0, NOW_NS, (0, 0, 0), b"14\0\0\x000\0x")]
    lies = b"PRIORITY=8\nSYSLOG_FACILITY=99999999999999999999999\n_UID=-1\n_PID=x\nSYSLOG_PID=4294967296\n"
    assert collect(lies + b"__REALTIME_TIMESTAMP=99999999999999999999\n\n") == [
        (FIELDS, 0, NOW_NS, (0, 0, 0), b"14\0\0\x000\0")
    ]
    assert collect(b"\n\n\n") == []


def test_program_can_write_no_field_of_the_journals() -> None:
    """The journal refuses names with `_` first; a message with a line end in it comes with its size."""
    forged = b"x\n_UID=0\n\nMESSAGE=root was here\n_UID=0\n"
    sized = b"MESSAGE\n" + len(forged).to_bytes(8, "little") + forged + b"\n_UID=1000\n\n"
    ((_, flags, _, writer, text),) = collect(sized)
    assert (flags, writer[1], text) == (HAS_WRITER, 1000, b"14\0\0\x000\0" + forged)


def test_first_of_two_values_counts() -> None:
    assert find_texts(b"MESSAGE=a\nMESSAGE=b\n\n") == [b"a"]


def test_name_has_no_nul_and_a_ceiling() -> None:
    name = b"a\0b" + b"c" * 400
    record = b"MESSAGE=x\nSYSLOG_IDENTIFIER\n" + len(name).to_bytes(8, "little") + name + b"\n\n"
    ((*_, text),) = collect(record)
    assert text.split(b"\0")[2] == b"a?b" + b"c" * 252


def test_records_of_the_kernel_are_left_out() -> None:
    assert find_texts(b"_TRANSPORT=kernel\nMESSAGE=a\n\n_TRANSPORT=driver\nMESSAGE=b\n\n") == [b"b"]


@pytest.mark.parametrize("step", [1000, LINE_MAX, 1 << 20])
@pytest.mark.parametrize("size", [VALUE_MAX - 100, VALUE_MAX, VALUE_MAX + 1, 300_000])
@pytest.mark.parametrize("is_sized", [False, True])
def test_long_message_is_cut_and_the_next_record_is_whole(is_sized: bool, size: int, step: int) -> None:
    message = b"m" * size
    field = b"MESSAGE\n" + size.to_bytes(8, "little") + message if is_sized else b"MESSAGE=" + message
    # A long field that is not wanted goes by.
    other = b"OTHER=" + b"o" * 100_000 + b"\nMORE\n" + (70_000).to_bytes(8, "little") + b"\n" * 70_000
    stream = field + b"\n" + other + b"\n_UID=1\n\n" + RECORD
    first, second = collect(*(stream[at : at + step] for at in range(0, len(stream), step)))
    head = b"14\0\0\x000\0"
    assert first[4] == head + message[: TEXT_MAX - len(head)]
    assert first[1] == HAS_WRITER | (IS_CUT if size > TEXT_MAX - len(head) else 0)
    assert [second] == collect(RECORD)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"MESSAGE", b"=", b"\n", b"_UID=1", b"\n\n", bytes(8)])))
def test_any_stream_gives_records_that_fit(pieces: list[bytes]) -> None:
    for source, flags, time_ns, writer, text in collect(*pieces):
        HEADER.pack(len(text), source, flags, 0, 0, time_ns, *writer)
        assert len(text) <= TEXT_MAX
        assert text.count(b"\0") >= 4
