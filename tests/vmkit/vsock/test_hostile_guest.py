"""A guest that lies: forged addresses, wrong operations and lengths, broken rings. The device lives on."""

import struct
from collections.abc import Callable

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench, open_bench
from tests.vmkit.vsock.fake_driver import FakeDriver
from vmkit.vsock import packet as pk


def resets(bench: Bench) -> list[pk.Header]:
    return [header for header in bench.driver.received if header.op == pk.OP_RST]


def assert_alive(bench: Bench, port: int = 9999) -> None:
    """A new connection still works."""
    program, guest = bench.open_to_guest(port)
    guest.send(b"alive")
    bench.wait(lambda: program.data == b"alive")
    program.close()


def test_forged_source_is_dropped_without_an_answer(bench: Bench) -> None:
    listener = bench.listen(7777)
    for cid in (0, 1, 2, 4, 2**32 - 1, 2**63):
        bench.driver.send_packet(bench.driver.header(7777, 100, pk.OP_REQUEST, src_cid=cid))
    bench.settle()
    assert not bench.driver.received
    with pytest.raises(BlockingIOError):
        listener.accept()
    assert "dropped-source" in bench.log()
    assert_alive(bench)


@pytest.mark.parametrize("cid", [0, 1, 3, 4, 2**32 - 1, 2**32 + 2])
def test_destination_that_is_not_the_host_is_reset(bench: Bench, cid: int) -> None:
    bench.listen(7777)
    bench.driver.send_packet(bench.driver.header(7777, 100, pk.OP_REQUEST, dst_cid=cid))
    bench.wait(lambda: bench.driver.received)
    answer = bench.driver.received[0]
    assert answer == pk.Header(cid, 3, 7777, 100, 0, 1, pk.OP_RST, 0, 0, 0)


def test_guest_reaches_no_program_of_its_neighbour() -> None:
    """Two machines with the same CID, even: what is a program of one is nobody to the other, and so are its guests."""
    with open_bench() as ours, open_bench() as theirs:
        ours.driver.boot()
        theirs.driver.boot()
        listener = theirs.listen(7777)
        _program, guest = theirs.open_to_guest(9001)
        for port in (7777, 9001, guest.host_port):
            refused = ours.driver.dial(port)
            ours.wait_for_reset(refused)
        for op in (pk.OP_RW, pk.OP_RST, pk.OP_SHUTDOWN):
            ours.driver.send_packet(ours.driver.header(guest.host_port, guest.guest_port, op, flags=3))
        ours.settle()
        theirs.settle()
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert not guest.is_reset and guest.is_open
        assert "refused-host-port" in ours.log() and "refused" not in theirs.log()


@pytest.mark.parametrize("kind", [0, 2, 3, 0xFFFF])
def test_other_socket_types_are_reset(bench: Bench, kind: int) -> None:
    bench.listen(7777)
    bench.driver.send_packet(bench.driver.header(7777, 100, pk.OP_REQUEST, type=kind))
    bench.wait(lambda: bench.driver.received)
    answer = bench.driver.received[0]
    assert (answer.op, answer.type, answer.dst_port) == (pk.OP_RST, kind, 100)


def test_source_port_decides_about_a_privileged_port() -> None:
    with open_bench("--privileged-port", "7777", "--privileged-port", "7778") as bench:
        bench.driver.boot()
        listener = bench.listen(7777)
        bench.listen(7778)
        for port, source in ((7777, 1024), (7778, 5000), (7777, 2**32 - 1)):
            refused = bench.driver.dial(port, source_port=source)
            bench.wait_for_reset(refused)
        allowed = bench.driver.dial(7777, source_port=1023)
        bench.accept(listener)
        bench.wait(lambda: allowed.is_open)
        assert bench.log().count("refused-unprivileged") == 3


def test_stray_packets_are_reset_and_a_stray_rst_is_not(bench: Bench) -> None:
    for op in (0, pk.OP_RESPONSE, pk.OP_RW, pk.OP_CREDIT_REQUEST, pk.OP_SHUTDOWN, 99, pk.OP_RST):
        bench.driver.send_packet(bench.driver.header(500 + op, 100, op))
    bench.wait(lambda: len(resets(bench)) == 6)
    bench.settle()
    assert sorted(header.src_port for header in resets(bench)) == [500, 502, 504, 505, 507, 599]


@pytest.mark.parametrize("op", [0, pk.OP_REQUEST, pk.OP_RESPONSE, 8, 0xFFFF])
def test_wrong_operation_on_an_open_connection_resets_it(bench: Bench, op: int) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.say(op)
    bench.wait(lambda: guest.is_reset and program.is_ended)
    assert "violation" in bench.log()
    assert_alive(bench)


def test_more_bytes_than_the_credit_reset_the_connection_alone(bench: Bench) -> None:
    other, other_guest = bench.open_to_guest(9002)
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    for _ in range(20):
        guest.say(pk.OP_RW, bytes(60000))
    bench.wait(lambda: guest.is_reset)
    assert "beyond its credit" in bench.log()
    other_guest.send(b"still here")
    bench.wait(lambda: other.data == b"still here")


def test_length_beyond_the_buffer_resets_the_connection(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.say(pk.OP_RW, b"abc", length=4)
    bench.wait(lambda: guest.is_reset and program.is_ended)
    assert not program.data


def test_bytes_behind_the_length_are_not_data(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.say(pk.OP_RW, b"abcdef", length=3)
    guest.say(pk.OP_CREDIT_UPDATE, b"junk")
    guest.say(pk.OP_RW, b"", length=0)
    guest.say(pk.OP_RW, b"g")
    bench.wait(lambda: program.data == b"abcg")


def test_bytes_after_shutdown_reset_the_connection(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.shutdown(pk.SHUTDOWN_SEND)
    guest.say(pk.OP_RW, b"x")
    bench.wait(lambda: guest.is_reset and program.is_ended)
    assert not program.data


def test_packets_shorter_than_a_header_are_dropped(bench: Bench) -> None:
    area = bench.driver.ram.allocate(64)
    for size in (1, 43):
        bench.driver.tx.add([(area, size)], is_writable=False)
    bench.driver.tx.kick(is_forced=True)
    bench.wait(lambda: "dropped-short" in bench.log())
    assert_alive(bench)


def test_absurd_credit_gives_nothing_and_harms_nobody(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.is_reading = False
    guest.say(pk.OP_CREDIT_UPDATE, fwd_cnt=1000, buf_alloc=65536)
    bench.settle()
    program.send(b"x" * 1000)
    bench.settle()
    assert not guest.unread
    assert_alive(bench)
    guest.say(pk.OP_CREDIT_UPDATE, fwd_cnt=0, buf_alloc=100)
    bench.wait(lambda: len(guest.unread) == 100)


def test_same_ports_twice_reset_both(bench: Bench) -> None:
    program, guest = bench.open_to_host(7777)
    guest.say(pk.OP_REQUEST)
    bench.wait(lambda: guest.is_reset and program.is_ended)


def test_flood_of_strays_without_rx_buffers_is_bounded_and_passes(bench: Bench) -> None:
    bench.driver.is_refilling = False
    bench.driver.is_stack_on = False
    for _ in range(20):
        for i in range(100):
            bench.driver.send_packet(bench.driver.header(9, 10_000 + i + len(bench.driver.received), pk.OP_RW))
        bench.driver.sync()
        bench.driver.poll()
    bench.driver.is_refilling = True
    bench.driver.refill()
    bench.wait(lambda: not bench.driver.tx_backlog and len(bench.driver.tx.free) == fd.RING_SIZE)
    bench.driver.is_stack_on = True
    assert_alive(bench)


def test_too_many_connections_are_refused_and_places_come_back() -> None:
    # The limit follows from the open files the host allows, less those the device keeps for itself.
    with open_bench(nofile=64 + 20) as bench:
        bench.driver.boot()
        listener = bench.listen(7777)
        guests = [bench.driver.dial(7777) for _ in range(30)]
        bench.wait(lambda: all(guest.is_open or guest.is_reset for guest in guests))
        programs = [bench.accept(listener) for guest in guests if guest.is_open]
        # The last place is a host program's.
        assert len(programs) == 19
        assert "refused-full" in bench.log()
        programs.append(bench.open_to_guest(9001)[0])
        late = bench.connect()
        late.send(b"CONNECT 1\n")
        bench.wait(lambda: late.is_ended)
        assert late.data == b"FULL 20\n"
        for program in programs:
            program.close()
        bench.wait(lambda: not bench.driver.sockets)
        assert_alive(bench)


def test_connections_beyond_the_memory_budget_keep_a_small_window(bench: Bench) -> None:
    bench.driver.listen(9001)
    programs = [bench.connect() for _ in range(160)]
    for program in programs:
        program.send(b"CONNECT 9001\n")
    guests = bench.driver.listening[9001]
    bench.wait(lambda: len(guests) == 160)
    assert {guest.peer_buf_alloc for guest in guests} == {16384}
    for guest in guests:
        guest.send(bytes(100_000))
    bench.wait(lambda: sum(len(program.data) for program in programs) >= 160 * 100_000)
    assert sorted(guest.peer_buf_alloc for guest in guests) == [16384] * 24 + [262144] * 136
    for program in programs:
        program.close()
    bench.wait(lambda: not bench.driver.sockets)
    program, guest = bench.open_to_guest(9001)
    guest.send(bytes(100_000))
    bench.wait(lambda: guest.peer_buf_alloc == 262144)


def break_loop(driver: fd.FakeDriver) -> None:
    area = driver.ram.allocate(64)
    driver.tx.write_desc(5, area, 44, fd.NEXT, 6)
    driver.tx.write_desc(6, area, 1, fd.NEXT, 5)
    driver.tx.offer(5)


def break_address(driver: fd.FakeDriver) -> None:
    driver.tx.write_desc(5, 2**63, 44, 0, 0)
    driver.tx.offer(5)


def break_hole(driver: fd.FakeDriver) -> None:
    driver.tx.write_desc(5, fd.LOW_END - 20, 44, 0, 0)
    driver.tx.offer(5)


def break_head(driver: fd.FakeDriver) -> None:
    driver.tx.offer(fd.RING_SIZE)


def break_next(driver: fd.FakeDriver) -> None:
    driver.tx.write_desc(5, driver.ram.allocate(64), 44, fd.NEXT, 60000)
    driver.tx.offer(5)


def break_index(driver: fd.FakeDriver) -> None:
    driver.tx.set_avail_idx((driver.tx.avail_idx + fd.RING_SIZE + 1) & 0xFFFF)


def break_direction(driver: fd.FakeDriver) -> None:
    driver.tx.add([(driver.ram.allocate(64), 44)], is_writable=True)


def break_rx_direction(driver: fd.FakeDriver) -> None:
    driver.rx.add([(driver.ram.allocate(64), 64)], is_writable=False)
    driver.send_packet(driver.header(1, 2, pk.OP_RW))


def break_rx_index(driver: fd.FakeDriver) -> None:
    driver.rx.set_avail_idx((driver.rx.avail_idx + 1000) & 0xFFFF)
    driver.send_packet(driver.header(1, 2, pk.OP_RW))


def break_indirect_in_indirect(driver: fd.FakeDriver) -> None:
    table = driver.ram.allocate(64)
    driver.ram.write(table, struct.pack("<QIHH", table, 16, fd.INDIRECT, 0))
    driver.tx.write_desc(5, table, 16, fd.INDIRECT, 0)
    driver.tx.offer(5)


def break_indirect_size(driver: fd.FakeDriver) -> None:
    driver.tx.write_desc(5, driver.ram.allocate(64), 17, fd.INDIRECT, 0)
    driver.tx.offer(5)


def break_indirect_huge(driver: fd.FakeDriver) -> None:
    driver.tx.write_desc(5, fd.HIGH_START, 16 * (fd.RING_SIZE + 1), fd.INDIRECT, 0)
    driver.tx.offer(5)


BREAKS = [
    break_loop,
    break_address,
    break_hole,
    break_head,
    break_next,
    break_index,
    break_direction,
    break_rx_direction,
    break_rx_index,
    break_indirect_in_indirect,
    break_indirect_size,
    break_indirect_huge,
]


@pytest.mark.parametrize("break_ring", BREAKS)
def test_broken_ring_stops_the_device_until_the_driver_resets_it(
    bench: Bench, break_ring: Callable[[FakeDriver], object]
) -> None:
    program, _guest = bench.open_to_guest(9001)
    if break_ring in {break_rx_direction, break_rx_index}:
        # These need an rx ring without buffers that were fine.
        bench.driver.is_refilling = False
        bench.wait(lambda: not bench.driver.rx_pieces or drain_rx(bench))
    break_ring(bench.driver)
    for ring in (bench.driver.rx, bench.driver.tx):
        ring.kick(is_forced=True)
    bench.wait_log("device-broken")
    program.read_to_end()
    bench.driver.is_refilling = True
    bench.driver.reboot()
    assert_alive(bench)


def drain_rx(bench: Bench) -> bool:
    """Makes the device use up rx buffers by asking for RSTs."""
    bench.driver.next_port += 1
    bench.driver.send_packet(bench.driver.header(1, bench.driver.next_port, pk.OP_RW))
    return not bench.driver.rx_pieces


def test_waiting_connect_outlives_a_broken_device(bench: Bench) -> None:
    break_address(bench.driver)
    bench.driver.tx.kick(is_forced=True)
    bench.wait_log("device-broken")
    program = bench.connect()
    program.send(b"CONNECT 9001\n")
    bench.driver.reboot()
    bench.driver.listen(9001)
    assert program.line().startswith(b"OK ")


def test_newcomers_wait_for_those_who_are_leaving() -> None:
    with open_bench(nofile=64 + 20) as bench:
        bench.driver.boot()
        leaving = [bench.open_to_guest(9001)[0] for _ in range(20)]
        # Without buffers of the guest nobody can leave.
        bench.driver.is_refilling = False
        bench.wait(lambda: drain_rx(bench))
        for program in leaving:
            program.close()
        coming = [bench.connect() for _ in range(20)]
        for program in coming:
            program.send(b"CONNECT 9001\n")
        bench.settle()
        assert not any(program.is_ended for program in coming)
        bench.driver.is_refilling = True
        bench.wait(lambda: all(program.data.startswith(b"OK ") for program in coming))


def test_nothing_of_an_old_connection_reaches_the_next_at_the_same_ports(bench: Bench) -> None:
    _program, guest = bench.open_to_host(7777)
    bench.driver.is_stack_on = False
    bench.driver.is_refilling = False
    bench.wait(lambda: drain_rx(bench))
    # Without buffers of the guest the answers to these wait: CREDIT_UPDATE and SHUTDOWN.
    guest.say(pk.OP_CREDIT_REQUEST)
    guest.say(pk.OP_SHUTDOWN, flags=pk.SHUTDOWN_RECEIVE)
    guest.say(pk.OP_RST)
    guest.say(pk.OP_REQUEST)
    bench.settle()
    bench.driver.received.clear()
    bench.driver.is_refilling = True
    bench.driver.refill()
    bench.wait(lambda: any(header.op == pk.OP_RESPONSE for header in bench.driver.received))
    bench.settle()
    assert [header.op for header in bench.driver.received if header.dst_port == guest.guest_port] == [pk.OP_RESPONSE]
