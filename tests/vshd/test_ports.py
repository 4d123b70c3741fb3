"""Reports of listening ports: what the kernel tells, what is made of it, and the service over a socket pair."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.fuzz_ports import check_reports
from tests.vsh.forward.test_loopbacks import needs_ipv6
from tests.vsh.live import DEADLINE_S, Vshd, ended, read_line, wait_until
from tests.vshd.service_thread import serve_in_thread
from vsh.address import Address
from vsh.forward.guest import open_reports
from vshd.services import listeners
from vshd.services.listeners import DiagLooker, Looker, Seen, TableLooker, parse_diag, parse_table
from vshd.services.ports import PortsService, choose_addresses, find_own, is_own_process
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.ports import PAYLOAD_MAX, PORTS_MAX, PortReport, ReportReader, encode_report

ANY, LOOPBACK, OTHER = bytes(4), b"\x7f\0\0\1", b"\x0a\0\0\2"
ANY6, LOOPBACK6, OTHER6 = bytes(16), bytes(15) + b"\1", b"\xfd" + bytes(15)

# As a kernel of amd64 writes it: two listeners, then a connection.
TABLE = b"""\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000 100
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0000000000000000 100
   2: 0100007F:1F90 0100007F:8A3C 01 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000000000000000 20
"""
TABLE6 = b"""\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when
   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 0:0 0 0 0 7
"""


def is_diag_there() -> bool:
    try:
        DiagLooker().close()
    except OSError:
        return False
    return True


LOOKERS = [
    pytest.param(DiagLooker, marks=pytest.mark.skipif(not is_diag_there(), reason="this kernel has no sock_diag")),
    TableLooker,
]


@contextlib.contextmanager
def listening(host: str = "127.0.0.1", port: int = 0) -> Iterator[tuple[int, int]]:
    """A socket that listens: its port and inode."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as server:
        yield server.getsockname()[1], os.fstat(server.fileno()).st_ino


@pytest.mark.parametrize("make", LOOKERS)
def test_kernel_tells_who_begins_and_who_ends_to_listen(make: Callable[[], Looker]) -> None:
    looker = make()
    try:
        with listening() as (port, inode), listening("127.0.0.2") as (other, other_inode):
            found = looker.look()
            assert (LOOPBACK, port, inode) in found
            assert (b"\x7f\0\0\2", other, other_inode) in found
            with socket.create_connection(("127.0.0.1", port)):
                assert [seen for seen in looker.look() if seen[1] == port] == [(LOOPBACK, port, inode)]
        assert inode not in {seen[2] for seen in looker.look()}
    finally:
        looker.close()


@needs_ipv6
@pytest.mark.parametrize("make", LOOKERS)
def test_kernel_tells_ipv6_addresses(make: Callable[[], Looker]) -> None:
    looker = make()
    try:
        with listening("::1") as (port, inode):
            assert (LOOPBACK6, port, inode) in looker.look()
    finally:
        looker.close()


@pytest.mark.parametrize("size", [1, 7, 200, 4096])
def test_table_is_read_up_to_its_first_connection(size: int) -> None:
    taken = []

    def pages() -> Iterator[bytes]:
        for start in range(0, len(TABLE), size):
            taken.append(start)
            yield TABLE[start : start + size]
        raise AssertionError("connections are read as well")

    if size == 4096:
        # One page has it all.
        assert parse_table(iter([TABLE])) == parse_table(pages())
    first = struct.pack("=I", 0x0100007F)
    assert parse_table(pages()) == [(first, 8080, 4711), (ANY, 80, 4712)]


def test_table_of_ipv6_has_words_of_this_processor() -> None:
    [(address, port, inode)] = parse_table(iter([TABLE6]))
    assert (port, inode) == (80, 7)
    assert address == struct.pack("=4I", 0, 0, 0, 0x01000000)


def test_no_table_is_endless() -> None:
    line = TABLE.splitlines(keepends=True)[1]
    taken = []

    def pages() -> Iterator[bytes]:
        while True:
            taken.append(1)
            yield line * 20

    assert len(parse_table(pages())) == listeners.LISTENERS_MAX
    assert len(taken) * 20 <= listeners.LISTENERS_MAX + 20
    taken.clear()
    assert parse_table(b"x" * 4096 for _ in range(100)) == []


def make_answer(kind: int, body: bytes, sequence: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, sequence, 0) + body


def make_socket(port: int, state: int = 10) -> bytes:
    body = struct.pack("=BBBB2s2s16s", 2, state, 0, 0, port.to_bytes(2, "big"), b"", LOOPBACK)
    return make_answer(20, body + bytes(72 - 4 - len(body)) + struct.pack("=I", 99))


def test_netlink_answer_may_come_in_pieces_and_ends_with_done() -> None:
    found: list[Seen] = []
    assert not parse_diag(make_socket(80) + make_socket(81), 2, found)
    assert not parse_diag(make_socket(82, state=1), 2, found)
    assert parse_diag(make_socket(83) + make_answer(3, bytes(4)), 2, found)
    assert found == [(LOOPBACK, port, 99) for port in (80, 81, 83)]


def test_netlink_answer_to_an_earlier_question_is_left_out() -> None:
    found: list[Seen] = []
    assert not parse_diag(make_socket(80) + make_answer(3, bytes(4)), 10, found)
    assert found == []


@pytest.mark.parametrize(
    ("data", "code"),
    [(make_answer(2, struct.pack("=i", -2) + bytes(16)), 2), (b"\1" + bytes(15), 74), (b"\xff" * 16, 74)],
)
def test_refusal_of_the_kernel_is_an_error(data: bytes, code: int) -> None:
    with pytest.raises(OSError) as caught:
        parse_diag(data, 2, [])
    assert caught.value.errno == code


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        ([ANY], ANY),
        ([LOOPBACK6, LOOPBACK], LOOPBACK),
        ([ANY6, OTHER], ANY6),
        ([OTHER6, OTHER], OTHER),
        ([OTHER, b"\x0a\0\0\1"], b"\x0a\0\0\1"),
        ([OTHER6], OTHER6),
        # A socket of IPv6 that is bound to an address of IPv4.
        ([bytes(10) + b"\xff\xff" + OTHER], OTHER),
        # It needs the number of an interface.
        ([b"\xfe\x80" + bytes(14)], None),
        ([b"\xfe\xbf" + bytes(14)], None),
        ([b"\xfe\xc0" + bytes(14)], b"\xfe\xc0" + bytes(14)),
    ],
)
def test_port_has_the_address_that_is_best_reached(addresses: list[bytes], chosen: bytes | None) -> None:
    seen = [(address, 80, inode) for inode, address in enumerate(addresses)]
    assert choose_addresses(seen) == ({} if chosen is None else {80: chosen})


def test_report_lists_the_lowest_ports_and_counts_the_others() -> None:
    reader = ReportReader()
    assert reader.receive_data(encode_report({80: ANY, 443: ANY6})) == {80: ANY, 443: ANY6}
    assert reader.receive_data(encode_report({})) == {}
    many = dict.fromkeys(range(1, PORTS_MAX + 45), OTHER6)
    frame = encode_report(many)
    assert len(frame) <= PAYLOAD_MAX + 4
    assert reader.receive_data(frame) == dict.fromkeys(range(1, PORTS_MAX + 1), OTHER6)
    assert reader.left_out == 44


def test_last_report_counts() -> None:
    reader = ReportReader()
    first, second, third = (encode_report({port: ANY}) for port in (1, 2, 3))
    assert reader.receive_data(first + second + third[:5]) == {2: ANY}
    assert reader.receive_data(third[5:-1]) is None
    assert reader.receive_data(third[-1:]) == {3: ANY}


@pytest.mark.parametrize(
    "data",
    [
        (PAYLOAD_MAX + 1).to_bytes(4, "little"),
        b"\xff" * 4,
        b"\2\0\0\0\x0a\xff",
        *(
            len(payload).to_bytes(4, "little") + payload
            for entries in (
                [ANY + b"\0\0"],
                [b"\0\x50"],
                [b""],
                [bytes(5) + b"\0\x50"],
                [ANY + b"\0\1"] * (PORTS_MAX + 1),
            )
            for payload in [PortReport(entries).encode()]
        ),
    ],
)
def test_what_is_no_report_is_a_fault(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        ReportReader().receive_data(data)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_any_bytes_give_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    check_reports(data, [min(cut, len(data)) for cut in cuts])


class Served:
    """A running service. `end` is its last word."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.end = ""
        self.reader = ReportReader()

    def next(self) -> dict[int, bytes]:
        """The next report."""
        while True:
            data = self.client.recv(1 << 16)
            assert data, "the end"
            ports = self.reader.receive_data(data)
            if ports is not None:
                return ports

    def wait(self, is_so: Callable[[dict[int, bytes]], bool]) -> dict[int, bytes]:
        """The next report of which that is so: other programs of this host open and close ports, too."""
        while True:
            ports = self.next()
            if is_so(ports):
                return ports


@pytest.mark.parametrize("make", LOOKERS)
def test_service_reports_at_once_and_each_change(make: Callable[[], Looker]) -> None:
    ours, theirs = socket.socketpair()
    served = Served(ours)
    with listening() as (first, _), serve_in_thread(lambda: PortsService(make()), served, theirs, b""):
        assert served.next()[first] == LOOPBACK
        with listening("127.0.0.2") as (second, _):
            ports = served.wait(lambda ports: second in ports)
            # All of them, not what is new.
            assert (ports[first], ports[second]) == (LOOPBACK, b"\x7f\0\0\2")
        assert first in served.wait(lambda ports: second not in ports)
    assert served.end == "closed"


class Scripted:
    """A looker that has seen what the test says."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.looks = 0
        self.is_closed = False

    def look(self) -> list[Seen]:
        self.looks += 1
        return self.seen

    def close(self) -> None:
        self.is_closed = True


def test_client_that_reads_nothing_costs_one_report_and_gets_the_latest() -> None:
    ours, theirs = socket.socketpair()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        ours.setsockopt(socket.SOL_SOCKET, option, 1)
        theirs.setsockopt(socket.SOL_SOCKET, option, 1)
    # A report that fills what the kernel takes.
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4) * 64)
    served, looker = Served(ours), Scripted()
    looker.seen = [(LOOPBACK, port, port) for port in range(1, 200)]
    with serve_in_thread(lambda: PortsService(looker), served, theirs, b""):  # type: ignore[arg-type]  # a stand-in
        wait_until(lambda: looker.looks == 1, "the first look")
        looker.seen = [(LOOPBACK, 7, 7)]
        # Empty reports fill the way; behind them come the first report and the last one.
        assert served.wait(lambda ports: 7 in ports) == dict.fromkeys(range(1, 200), LOOPBACK)
        assert served.wait(lambda ports: 7 in ports) == {7: LOOPBACK}
    assert looker.is_closed


def test_ports_that_vshd_listens_on_are_not_reported(vshd: Vshd) -> None:
    """They are a client's, who has them at home."""
    with listening() as (target, _), ended(vshd.start("-v", "-N", "-R", f"0:{target}")) as process:
        ours = int(read_line(process.stderr).split(" for ")[0].rpartition(":")[2])
        fd, first = open_reports(Address.unix(str(vshd.path)), timeout_s=DEADLINE_S)
        with socket.socket(fileno=fd) as client:
            client.settimeout(DEADLINE_S)
            served = Served(client)
            ports = served.reader.receive_data(first)
            ports = served.next() if ports is None else ports
        assert target in ports
        assert ours not in ports
    wait_until(lambda: not vshd.children(), "no session is left")


def test_only_processes_of_vshd_are_ours(vshd: Vshd) -> None:
    assert is_own_process(f"/proc/{vshd.pid}")
    assert not is_own_process("/proc/self")
    assert not is_own_process("/proc/0")
    with listening() as (_, inode):
        assert find_own({inode}) == set()
