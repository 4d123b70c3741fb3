"""The trace of the real device process: what is recorded, what filters leave, and that it neither waits nor grows."""

import socket
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.vmkit.vsock.device_process import Bench
from tests.vmkit.vsock.fake_driver import GUEST_CID
from vmkit.errors import MachineError
from vmkit.packets.control import DeviceControl, open_control
from vmkit.vsock import packet as pk
from vmkit.vsock.control import MAX_FOLLOWERS
from vmkit.vsock.packet import Header
from vmkit.vsock.records import Captured, RecordReader, TraceError
from vmkit.vsock.requests import MAX_SNAPLEN_BYTES, TO_GUEST, TO_HOST, ListFaults, TraceRequest, render_request
from vmkit.vsock.tap import BUFFER_BYTES, RECENT_PACKETS, Follower


@pytest.fixture
def control(bench: Bench) -> Iterator[DeviceControl]:
    """A user's program at the device's control socket."""
    with open_control(bench.control_path) as control:
        yield control


def header_of(packet: Captured) -> Header:
    assert packet.header is not None
    return packet.header


def test_trace_has_every_packet_in_order_with_its_payload(bench: Bench, control: DeviceControl) -> None:
    packets = control.follow(TraceRequest(snaplen=MAX_SNAPLEN_BYTES))
    program, guest = bench.open_to_guest(9001)
    program.send(b"to guest")
    bench.wait_for_data(guest, b"to guest")
    guest.send(b"to host")
    bench.wait_for_data(program, b"to host")
    program.close()
    bench.wait(lambda: guest.is_ended)
    bench.settle()
    taken = []
    for packet in packets:
        taken.append(packet)
        if header_of(packet).op == pk.OP_RST:
            break
    ops = [header_of(packet).op for packet in taken if header_of(packet).op != pk.OP_CREDIT_UPDATE]
    assert ops == [pk.OP_REQUEST, pk.OP_RESPONSE, pk.OP_RW, pk.OP_RW, pk.OP_SHUTDOWN, pk.OP_RST]
    assert [packet.payload for packet in taken if packet.payload] == [b"to guest", b"to host"]
    assert [packet.dropped for packet in taken] == [0] * len(taken)
    assert taken == sorted(taken, key=lambda packet: packet.time_ns)
    first = taken[0]
    assert not first.is_from_guest
    assert header_of(first)[:4] == (pk.HOST_CID, GUEST_CID, guest.host_port, 9001)


def test_recent_packets_are_kept_for_a_program_that_comes_later(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    program.send(b"to guest")
    bench.wait_for_data(guest, b"to guest")
    guest.send(b"to host")
    bench.wait_for_data(program, b"to host")
    recent = [packet for packet in control.ask_recent() if header_of(packet).op != pk.OP_CREDIT_UPDATE]
    assert [header_of(packet).op for packet in recent] == [pk.OP_REQUEST, pk.OP_RESPONSE, pk.OP_RW, pk.OP_RW]
    assert [packet.is_from_guest for packet in recent] == [False, True, False, True]
    assert [header_of(packet).length for packet in recent] == [0, 0, len(b"to guest"), len(b"to host")]
    assert {packet.payload for packet in recent} == {b""}
    assert recent == sorted(recent, key=lambda packet: packet.time_ns)


def test_of_many_packets_the_last_ones_are_kept(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    for _ in range(RECENT_PACKETS + 10):
        before = len(guest.data)
        program.send(b"x")
        bench.wait_for_data(guest, b"x" * (before + 1))
    recent = control.ask_recent()
    assert len(recent) == RECENT_PACKETS
    assert pk.OP_REQUEST not in {header_of(packet).op for packet in recent}


def test_trace_cuts_payload_and_keeps_its_length(bench: Bench, control: DeviceControl) -> None:
    packets = control.follow(TraceRequest(ops=(pk.OP_RW,), snaplen=3))
    program, guest = bench.open_to_guest(9001)
    program.send(b"x" * 20_000)
    bench.wait(lambda: len(guest.data) == 20_000)
    guest.send(b"abcdef")
    bench.wait_for_data(program, b"abcdef")
    taken = []
    for packet in packets:
        taken.append(packet)
        if packet.is_from_guest:
            break
    assert {packet.payload for packet in taken[:-1]} == {b"xxx"}
    assert sum(header_of(packet).length for packet in taken[:-1]) == 20_000
    assert (taken[-1].payload, header_of(taken[-1]).length) == (b"abc", 6)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (TraceRequest(ports=(9002,)), {(9002, False), (9002, True)}),
        (TraceRequest(direction=TO_HOST), {(9001, True), (9002, True)}),
        (TraceRequest(direction=TO_GUEST, ports=(9001,)), {(9001, False)}),
        (TraceRequest(ops=(pk.OP_REQUEST,)), {(9001, False), (9002, False)}),
    ],
    ids=["port", "direction", "both", "op"],
)
def test_filters_leave_what_was_asked_for(
    bench: Bench, control: DeviceControl, wanted: TraceRequest, expected: set[tuple[int, bool]]
) -> None:
    packets = control.follow(wanted)
    for port in (9001, 9002):
        bench.open_to_guest(port)
    bench.settle()
    bench.leave()
    seen = set()
    for packet in packets:
        header = header_of(packet)
        assert not wanted.ops or header.op in wanted.ops
        seen.add((header.src_port if packet.is_from_guest else header.dst_port, packet.is_from_guest))
    assert seen == expected


def test_program_that_does_not_read_stops_nothing_and_learns_what_it_missed(
    bench: Bench, control: DeviceControl
) -> None:
    packets = control.follow(TraceRequest(snaplen=MAX_SNAPLEN_BYTES))
    program, guest = bench.open_to_guest(9001)
    size = 4 * BUFFER_BYTES
    program.send(b"x" * size)
    bench.wait(lambda: len(guest.data) == size)
    # A record with a count comes as soon as there is room again.
    taken = []
    for packet in packets:
        taken.append(packet)
        if packet.dropped:
            break
    program.send(b"end")
    bench.wait_for_data(guest, b"end")
    for packet in packets:
        taken.append(packet)
        if packet.payload.endswith(b"end"):
            break
    assert sum(len(packet.payload) for packet in taken) < size
    # What was kept is whole and in order.
    assert taken == sorted(taken, key=lambda packet: packet.time_ns)


def test_trace_ends_with_the_device(bench: Bench, control: DeviceControl) -> None:
    packets = control.follow(TraceRequest())
    bench.leave()
    assert list(packets) == []


def test_program_that_leaves_or_sends_more_ends_its_trace(bench: Bench) -> None:
    with open_control(bench.control_path) as control:
        control.follow(TraceRequest())
    with open_control(bench.control_path) as control:
        packets = control.follow(TraceRequest())
        control._sock.sendall(b"more\n")
        assert list(packets) == []
    bench.open_to_guest(9001)


def test_few_programs_follow_at_once(bench: Bench) -> None:
    controls = [open_control(bench.control_path) for _ in range(MAX_FOLLOWERS + 1)]
    entered = [control.__enter__() for control in controls]
    for control in entered[:-1]:
        control.follow(TraceRequest())
    with pytest.raises(MachineError, match="4 programs follow"):
        entered[-1].follow(TraceRequest())
    assert entered[-1].ask(ListFaults()) == []
    for opened in controls:
        opened.__exit__(None, None, None)


def test_strangers_at_the_door_cost_nothing(bench: Bench) -> None:
    crowd = [socket.socket(socket.AF_UNIX) for _ in range(40)]
    for sock in crowd:
        sock.connect(str(bench.control_path))
    bench.open_to_guest(9001)
    for sock in crowd:
        sock.close()
    bench.settle()
    with open_control(bench.control_path) as control:
        assert control.ask(ListFaults()) == []


# The core alone


def make_header(length: int, op: int = pk.OP_RW) -> Header:
    return Header(2, 3, 1000, 9001, length, pk.TYPE_STREAM, op, 0, 262144, 5)


def test_follower_drops_when_full_and_counts_in_the_next_record() -> None:
    follower = Follower(TraceRequest(snaplen=65536), clock_ns=lambda: 7)
    payload = [memoryview(b"x" * 60_000)]
    for _ in range(20):
        follower.note(make_header(60_000), payload, is_from_guest=True)
    kept = list(RecordReader(65536).feed(bytes(follower.buffer)))
    assert len(follower.buffer) <= BUFFER_BYTES
    follower.buffer.clear()
    follower.report_gap()
    (gap,) = RecordReader(65536).feed(bytes(follower.buffer))
    assert gap.header is None
    assert len(kept) + gap.dropped == 20
    follower.note(make_header(0), [], is_from_guest=True)
    assert follower.dropped == 0


def test_reader_takes_a_stream_byte_by_byte() -> None:
    follower = Follower(TraceRequest(snaplen=10), clock_ns=lambda: 7)
    follower.note(make_header(3), [memoryview(b"a"), memoryview(b"bc")], is_from_guest=False)
    follower.note(make_header(0, pk.OP_RST), [], is_from_guest=True)
    reader = RecordReader(10)
    taken = [packet for byte in follower.buffer for packet in reader.feed(bytes([byte]))]
    assert taken == [
        Captured(7, False, make_header(3), b"abc", 0),
        Captured(7, True, make_header(0, pk.OP_RST), b"", 0),
    ]


def test_reader_refuses_what_is_no_record() -> None:
    with pytest.raises(TraceError):
        list(RecordReader(10).feed(b"\xff" * 64))


def test_request_line_is_short() -> None:
    line = render_request(TraceRequest(tuple(range(2**32 - 16, 2**32)), tuple(range(1, 8)), TO_GUEST, 65536))
    assert len(line) < 1024
    assert list(islice(line.split(), 1)) == [b"trace"]
