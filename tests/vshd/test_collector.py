"""The log of a guest: what programs and the kernel write reaches the host, and nobody waits for a host that is slow."""

import os
import socket
import threading
from itertools import pairwise

import pytest

from tests.descriptors import nothing_left_open
from tests.other_user import SOMEBODY_ELSE, ask_as_other
from tests.vsh.live import DEADLINE_S, StartVshd, wait_until
from tests.vshd.collecting import Collecting, collecting
from vsh.address import Address
from vsh.errors import VshError
from vsh.logs import open_logs
from vshd.carry.records import (
    COLLECTOR,
    HAS_WRITER,
    HEADER,
    IS_CUT,
    KERNEL,
    SYSLOG,
    TEXT_MAX,
    LogReader,
    LogRecord,
    RecordError,
)
from vshd.services.logs import open_service
from vshd.session.refusal import RefusalError
from vshd.syslog.kept import KeptRecords
from vshd.wire.requests import Logs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def test_lines_arrive_in_order_with_their_writer() -> None:
    with collecting() as guest:
        guest.write(b"<13>first", b"<11>second\n")
        with guest.connect() as host:
            guest.write(b"<14>third")
            records = host.read()
    assert [record.text for record in records] == [b"<13>first", b"<11>second\n", b"<14>third"]
    assert [record.number for record in records] == [0, 1, 2]
    for record in records:
        assert (record.source, record.flags, record.pid) == (SYSLOG, HAS_WRITER, os.getpid())
        assert (record.uid, record.gid) == (os.geteuid(), os.getegid())


def forge(path: str) -> str:
    """Tries to write as pid 1; writes as itself then."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as program:
        program.connect(path)
        words = b"".join(number.to_bytes(4, "little") for number in (1, 0, 0))
        try:
            program.sendmsg([b"<0>kernel: forged"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, words)])
        except PermissionError as error:
            program.send(b"<0>kernel: forged")
            return type(error).__name__
    return "it could"


@needs_root
def test_user_cannot_write_as_another() -> None:
    said = []

    def try_it(guest: Collecting) -> None:
        said.append(ask_as_other(lambda: forge(str(guest.log))))

    with collecting(before=try_it) as guest, guest.connect() as host:
        (record,) = host.read()
    assert said == ["'PermissionError'"]
    assert (record.source, record.uid, record.gid) == (SYSLOG, SOMEBODY_ELSE, SOMEBODY_ELSE)
    assert record.pid not in (0, 1, os.getpid())


def connect_to(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(path)


@needs_root
def test_user_cannot_reach_where_the_host_is_handed_on() -> None:
    said = []
    with collecting(before=lambda guest: said.append(ask_as_other(lambda: connect_to(str(guest.handed))))):
        pass
    assert said[0].startswith("PermissionError")


def test_records_of_the_kernel_have_its_time_and_lost_ones_are_counted() -> None:
    def log(guest: Collecting) -> None:
        # Before the collector reads: it compares the two clocks once for the records that it reads together.
        for record in (
            b"6,5,1000000,-;five\n",
            b"4,9,2000000,-;nine\n SUBSYSTEM=pci\n",
            b"no record",
            b"6,10,3000000,-;\n",
        ):
            guest.kernel.send(record)

    with collecting(before=log) as guest, guest.connect() as host:
        records = host.read()
    kernel = [record for record in records if record.source == KERNEL]
    assert [record.text.partition(b";")[2] for record in kernel] == [b"five\n", b"nine\n SUBSYSTEM=pci\n", b"\n"]
    assert kernel[1].time_ns - kernel[0].time_ns == 1_000_000_000
    assert not any(record.flags & HAS_WRITER for record in kernel)
    (own,) = [record for record in records if record.source == COLLECTOR]
    assert own.text == b"<44>vshd: 3 records of the kernel were overwritten before they were read"


def test_boot_comes_before_the_first_line_of_a_program() -> None:
    def log(guest: Collecting) -> None:
        guest.write(b"<14>line")
        guest.kernel.send(b"6,0,1,-;Linux version\n")

    with collecting(before=log) as guest, guest.connect() as host:
        assert [record.source for record in host.read()] == [KERNEL, SYSLOG]


def test_line_that_is_too_long_is_cut_and_says_so() -> None:
    with collecting() as guest:
        guest.write(b"x" * (TEXT_MAX + 1), b"")
        with guest.connect() as host:
            long, empty = host.read()
    assert (long.flags & IS_CUT, long.text) == (IS_CUT, b"x" * TEXT_MAX)
    assert (empty.flags & IS_CUT, empty.text) == (0, b"")


def test_host_that_does_not_read_costs_the_oldest_records_and_nobody_waits() -> None:
    line = b"<14>" + b"x" * 200
    with collecting(size_max=100_000) as guest, guest.connect() as slow:
        # Far more than the socket and the collector hold together. The sends would never end if somebody waited.
        for _ in range(40):
            guest.write(*([line] * 500))
        records = slow.read()
        with guest.connect(slow.collector, records[-1].number + 1) as host:
            assert host.begin.number == 20_000
    numbers = [record.number for record in records]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 19_999
    assert len(numbers) < 20_000
    gaps = [after for before, after in pairwise(numbers) if after != before + 1]
    assert gaps


def test_host_that_comes_back_gets_what_it_lacks() -> None:
    with collecting() as guest:
        guest.write(b"a", b"b", b"c")
        with guest.connect() as host:
            assert [record.number for record in host.read()] == [0, 1, 2]
        with guest.connect(host.collector, 2) as again:
            assert (again.begin.number, again.collector) == (2, host.collector)
            assert [record.text for record in again.read()] == [b"c"]
        with guest.connect(b"x" * 16, 2) as other:
            assert [record.text for record in other.read()] == [b"a", b"b", b"c"]
        with guest.connect(host.collector, 2**64 - 1) as ahead:
            assert ahead.begin.number == 3


def test_second_connection_takes_the_place_of_the_first() -> None:
    with collecting() as guest, guest.connect() as first, guest.connect() as second:
        assert first.read_to_end() == []
        guest.write(b"new")
        assert [record.text for record in second.read()] == [b"new"]


def test_strangers_at_the_socket_of_vshd_are_ignored_and_their_descriptors_closed() -> None:
    with nothing_left_open(), collecting() as guest:
        ours, theirs = socket.socketpair()
        with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.connect(str(guest.handed))
            for data, fds in (
                (b"", []),
                (bytes(24), []),
                (b"x", [theirs.fileno()]),
                (bytes(24), [theirs.fileno()] * 2),
            ):
                socket.send_fds(stranger, [data], fds)
        # The collector has taken them by the time of the next connection.
        guest.write(b"still there")
        with guest.connect() as host:
            assert [record.text for record in host.read()] == [b"still there"]
            assert ours.fileno() == -1


def test_descriptors_that_programs_send_along_are_closed() -> None:
    with collecting() as guest, guest.connect() as host, nothing_left_open():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as program:
            program.connect(str(guest.log))
            for _ in range(20):
                socket.send_fds(program, [b"<14>line"], [0, 1, 2])
        assert len(host.read()) == 20


def test_flood_of_words_ends_the_connection() -> None:
    with (
        collecting() as guest,
        guest.connect() as host,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        while True:
            host.sock.sendall(bytes(8 * 1000))


def test_last_words_of_a_guest_that_ends_reach_the_host() -> None:
    with collecting() as guest:
        connection = guest.connect()
        host = connection.__enter__()
        guest.write(b"the last")
    assert [record.text for record in host.read_to_end()] == [b"the last"]
    connection.__exit__(None, None, None)


def test_many_programs_lose_no_line() -> None:
    def write(name: int) -> None:
        guest.write(*(b"<14>%d %d" % (name, number) for number in range(500)))

    with collecting() as guest, guest.connect() as host:
        threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        records = host.read()
    assert [record.number for record in records] == list(range(4000))
    for name in range(8):
        texts = [record.text for record in records if record.text.startswith(b"<14>%d " % name)]
        assert texts == [b"<14>%d %d" % (name, number) for number in range(500)]


def test_guest_without_a_collector_refuses() -> None:
    with collecting() as guest:
        around = guest.around
        around.options.logs = ""
        with pytest.raises(RefusalError, match="without --logs"):
            open_service(Logs(), -1, around)
        around.options.logs = str(guest.log.with_name("nowhere"))
        with pytest.raises(RefusalError, match="no process collects the log of this guest: No such file"):
            open_service(Logs(), -1, around)


@needs_root
def test_real_vshd_hands_the_host_on_and_keeps_no_process(start_vshd: StartVshd) -> None:
    with collecting() as guest:
        vshd = start_vshd(f"--logs={guest.handed}")
        guest.write(b"<14>line")
        fd, rest = open_logs(Address.unix(str(vshd.path)), b"", 0, timeout_s=DEADLINE_S)
        with socket.socket(fileno=fd) as sock:
            sock.settimeout(DEADLINE_S)
            reader = LogReader()
            records = reader.feed(rest)
            while len(records) < 2:
                records += reader.feed(sock.recv(65536))
            wait_until(lambda: not vshd.children(), "the session's process has ended")
            guest.write(b"later")
            assert [record.text for record in reader.feed(sock.recv(65536))] == [b"later"]
    assert [record.text for record in records[1:]] == [b"<14>line"]
    assert ": the collector has the connection after " in vshd.log
    with pytest.raises(VshError, match="no process collects the log of this guest"):
        open_logs(Address.unix(str(vshd.path)), b"", 0, timeout_s=DEADLINE_S)


# ---- kept records, and the bytes of records --------------------------------------------------------------------------


def test_newest_records_are_kept_within_their_bounds() -> None:
    kept = KeptRecords(size_max=100, count_max=8)
    for number in range(1000):
        kept.add(b"%03d" % number)
        assert kept.next == number + 1
        assert kept.next - kept.first <= 8
    assert kept.take(0, 1) == (b"992", 993)
    assert kept.take(995, 7) == (b"995996997", 998)
    assert kept.take(999, 1 << 20) == (b"999", 1000)
    assert kept.take(1000, 1 << 20) == (b"", 1000)
    kept.add(b"x" * 90)
    assert kept.take(0, 1 << 20) == (b"997998999" + b"x" * 90, 1001)
    kept.add(b"y" * 1000)
    assert kept.take(0, 1 << 20) == (b"", 1002)


@pytest.mark.parametrize("size", [1, 3, 35, 36, 37, 1000])
def test_records_in_pieces_are_the_same_records(size: int) -> None:
    sent = [
        LogRecord(SYSLOG, 1, b"", flags=HAS_WRITER, time_ns=2**63, pid=1, uid=2**32 - 1, gid=3),
        LogRecord(KERNEL, 2**64 - 1, b"x" * TEXT_MAX),
        LogRecord(9, 3, b"\0\n<>"),
    ]
    data = b"".join(record.encode() for record in sent)
    reader = LogReader()
    found = [record for at in range(0, len(data), size) for record in reader.feed(data[at : at + size])]
    names = LogRecord.__slots__
    assert [[getattr(r, name) for name in names] for r in found] == [[getattr(r, name) for name in names] for r in sent]


def test_record_that_is_too_long_is_refused() -> None:
    with pytest.raises(RecordError, match="a record of 8193 bytes, more than 8192"):
        LogReader().feed(HEADER.pack(TEXT_MAX + 1, SYSLOG, 0, 0, 0, 0, 0, 0, 0))


def test_collector_leaves_nothing_open() -> None:
    with nothing_left_open(), collecting() as guest, guest.connect() as host:
        guest.write(b"line")
        host.read()
