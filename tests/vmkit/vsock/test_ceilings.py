"""Guests and host programs that want the device to remember more than it may. What it holds of its own is measured."""

import socket
from pathlib import Path

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench, open_bench
from vmkit.vsock import packet as pk

# A Python object here and there, and what the allocator keeps: far below what any of these guests would like to take.
SLACK_KIB = 4 * 1024
# One window of 256 KiB, which a buffer that grows may hold twice for a moment.
WINDOW_KIB = 512


def measure_kib(bench: Bench) -> int:
    """Memory of the device's own, without the guest's RAM."""
    status = Path(f"/proc/{bench.process.pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def flood(bench: Bench, headers: list[pk.Header], rounds: int) -> int:
    """Sends all that, again and again, and reads what comes back; how much the device's memory has grown by it."""
    before_kib = measure_kib(bench)
    for _ in range(rounds):
        for header in headers:
            bench.driver.send_packet(header)
        bench.wait(lambda: not bench.driver.tx_backlog)
        bench.driver.received.clear()
    bench.settle()
    return measure_kib(bench) - before_kib


@pytest.mark.parametrize("op", [pk.OP_RST, pk.OP_RESPONSE, pk.OP_SHUTDOWN, pk.OP_CREDIT_REQUEST, 0, 77])
def test_storm_at_ports_of_nobody_leaves_nothing(bench: Bench, op: int) -> None:
    headers = [bench.driver.header(port, 2000 + port, op) for port in range(100)]
    assert flood(bench, headers, 50) < SLACK_KIB


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        (pk.OP_RW, {"length": 0}),
        (pk.OP_CREDIT_UPDATE, {"buf_alloc": 2**32 - 1, "fwd_cnt": 0}),
        (pk.OP_CREDIT_UPDATE, {"buf_alloc": 2**32 - 1, "fwd_cnt": 2**31}),
        (pk.OP_CREDIT_REQUEST, {}),
        (pk.OP_SHUTDOWN, {"flags": 0}),
        (pk.OP_SHUTDOWN, {"flags": pk.SHUTDOWN_RECEIVE}),
    ],
)
def test_storm_on_an_open_connection_leaves_nothing(bench: Bench, op: int, fields: dict[str, int]) -> None:
    _program, guest = bench.open_to_guest(9001)
    header = bench.driver.header(guest.host_port, guest.guest_port, op, **fields)
    assert flood(bench, [header] * 100, 50) < SLACK_KIB


def test_guest_that_opens_without_end_meets_a_full_house(bench: Bench) -> None:
    """5000 connections to a program that accepts none; as many live as there are places."""
    bench.listen(7777, backlog=2000)
    # The guest's stack knows none of these connections, and would reset each that is answered.
    bench.driver.is_stack_on = False
    before_kib = measure_kib(bench)
    for first in range(2000, 7000, 100):
        for port in range(first, first + 100):
            bench.driver.send_packet(bench.driver.header(7777, port, pk.OP_REQUEST, buf_alloc=2**32 - 1))
        bench.wait(lambda: not bench.driver.tx_backlog)
    bench.settle()
    bench.wait(lambda: bench.open_count() == 1920)
    # 1920 sockets, records and table entries.
    assert measure_kib(bench) - before_kib < SLACK_KIB
    bench.driver.is_stack_on = True
    program, guest = bench.open_to_guest(9001)
    program.send(b"the owner gets in")
    bench.wait(lambda: guest.data == b"the owner gets in")


def test_guest_that_writes_to_programs_that_never_read_fills_windows_and_no_more() -> None:
    count = 40
    with open_bench() as bench:
        bench.driver.boot()
        listener = bench.listen(7777)
        before_kib = measure_kib(bench)
        guests = [bench.driver.dial(7777) for _ in range(count)]
        bench.wait(lambda: all(guest.is_open for guest in guests))
        for guest in guests:
            guest.send(bytes(2**20))
        bench.settle()
        bench.settle()
        assert measure_kib(bench) - before_kib < SLACK_KIB + count * WINDOW_KIB
        listener.close()


def test_guest_that_takes_back_its_connections_leaves_nothing(bench: Bench) -> None:
    """The same ports again and again: asked for, closed from the host, asked for again before the last RST."""
    listener = bench.listen(7777)
    bench.driver.is_stack_on = False

    def ask(times: int) -> None:
        for _ in range(times):
            bench.driver.send_packet(bench.driver.header(7777, 3000, pk.OP_REQUEST, buf_alloc=65536))
            bench.accept(listener).close()
            bench.programs.clear()
            bench.wait(lambda: bench.driver.received and bench.driver.received[-1].op == pk.OP_SHUTDOWN)
            bench.driver.received.clear()

    ask(100)
    before_kib = measure_kib(bench)
    ask(400)
    assert measure_kib(bench) - before_kib < SLACK_KIB
    bench.wait(lambda: bench.open_count() == 1)


def test_programs_that_come_in_crowds_and_say_nothing_get_places_and_no_more(bench: Bench) -> None:
    before_kib = measure_kib(bench)
    crowd = []
    for _ in range(3000):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        if sock.connect_ex(str(bench.uds_path)) != 0:
            sock.close()
            bench.settle()
            continue
        crowd.append(sock)
    bench.settle()
    assert bench.open_count() <= 2048
    assert measure_kib(bench) - before_kib < SLACK_KIB
    for sock in crowd:
        sock.close()
    program, guest = bench.open_to_guest(9001)
    guest.send(b"alive")
    bench.wait(lambda: program.data == b"alive")


def test_program_that_floods_a_guest_that_never_reads_is_held_in_its_own_socket(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.is_reading = False
    # All of it, says the guest, and takes nothing.
    guest.say(pk.OP_CREDIT_UPDATE, buf_alloc=2**32 - 1)
    bench.driver.is_refilling = False
    before_kib = measure_kib(bench)
    program.send(bytes(2**24))
    for _ in range(20):
        bench.settle()
    assert program.outbox
    assert measure_kib(bench) - before_kib < SLACK_KIB


def test_packets_in_splinters_cost_no_more_than_their_turn(bench: Bench) -> None:
    """Every byte in a descriptor of its own, for a program that does not read."""
    pieces = 100
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    area = bench.driver.ram.allocate(fd.RAM_BYTES // 64)
    header = bench.driver.header(guest.host_port, guest.guest_port, pk.OP_RW, length=pieces)
    bench.driver.ram.write(area, header.encode())
    before_kib = measure_kib(bench)
    for _ in range(200):
        bench.driver.tx.add([(area, pk.HEADER_SIZE)] + [(area + 100 + i, 1) for i in range(pieces)], is_writable=False)
        bench.driver.tx.kick()
        bench.wait(lambda: len(bench.driver.tx.free) == fd.RING_SIZE)
    assert measure_kib(bench) - before_kib < SLACK_KIB
