"""Bytes through the real device process: both ways, half-closed, in every cut, under load."""

import hashlib
import random
import socket
from typing import Any

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench, open_bench
from vmkit.vsock import packet as pk
from vmkit.vsock.muxer import FIRST_WINDOW_BYTES


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def test_device_connects_host_to_guest_and_echoes(bench: Bench) -> None:
    bench.driver.listen(9001)
    program = bench.connect()
    program.send(b"CONNECT 9001\n")
    answer = program.line()
    guest = bench.driver.accept(9001)
    assert answer == b"OK %d" % guest.host_port
    assert guest.host_port >= 2**30
    for word in (b"hello", b"x" * 70000, b"!"):
        program.send(word)
        bench.wait_for_data(guest, word)
        assert guest.data == word
        guest.send(bytes(guest.data))
        guest.data.clear()
        bench.wait_for_data(program, word)
        assert program.data == word
        program.data.clear()


def test_device_connects_guest_to_host_and_echoes(bench: Bench) -> None:
    program, guest = bench.open_to_host(7777)
    guest.send(b"READY=1\n")
    bench.wait(lambda: program.data == b"READY=1\n")
    program.send(b"thanks")
    bench.wait(lambda: guest.data == b"thanks")


def test_device_keeps_bytes_that_follow_the_connect_line(bench: Bench) -> None:
    bench.driver.listen(9001)
    program = bench.connect()
    program.send(b"CONNECT 9001\nalready here")
    guest = bench.driver.accept(9001)
    bench.wait(lambda: guest.data == b"already here")
    assert program.line().startswith(b"OK ")


def test_device_takes_a_connect_line_byte_by_byte(bench: Bench) -> None:
    bench.driver.listen(9001)
    program = bench.connect()
    for byte in b"CONNECT 9001\nab":
        program.send(bytes([byte]))
        bench.settle()
    guest = bench.driver.accept(9001)
    bench.wait(lambda: guest.data == b"ab")


@pytest.mark.parametrize("line", [b"HELLO\n", b"CONNECT x\n", b"CONNECT 4294967295\n", b"C" * 40, b"\n", b"CONNECT\n"])
def test_device_closes_on_a_bad_connect_line(bench: Bench, line: bytes) -> None:
    program = bench.connect()
    program.send(line)
    bench.wait(lambda: program.is_ended)
    assert not program.data
    bench.wait(lambda: bench.open_count() == 0)


def test_device_refuses_a_port_without_listener_by_a_close(bench: Bench) -> None:
    program = bench.connect()
    program.send(b"CONNECT 4242\n")
    bench.wait(lambda: program.is_ended)
    assert not program.data


def test_device_resets_a_guest_that_asks_for_a_port_nobody_listens_at(bench: Bench) -> None:
    guest = bench.driver.dial(4242)
    bench.wait(lambda: guest.is_reset)
    bench.wait(lambda: bench.open_count() == 0)


def test_device_resets_a_guest_when_the_socket_file_is_stale(bench: Bench) -> None:
    bench.listen(4242).close()
    guest = bench.driver.dial(4242)
    bench.wait(lambda: guest.is_reset)


def test_host_half_close_lets_the_guest_answer(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.send(b"question")
    program.end()
    bench.wait(lambda: guest.is_ended)
    assert guest.data == b"question"
    assert guest.heard == pk.SHUTDOWN_SEND
    guest.send(random_bytes(300_000))
    guest.close()
    bench.wait(lambda: program.is_ended)
    assert program.data == random_bytes(300_000)
    bench.wait(lambda: guest.is_reset)
    bench.wait(lambda: bench.open_count() == 0)


def test_guest_half_close_lets_the_host_answer(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.send(b"question")
    guest.shutdown(pk.SHUTDOWN_SEND)
    bench.wait(lambda: program.is_ended)
    assert program.data == b"question"
    program.send(random_bytes(300_000))
    bench.wait(lambda: len(guest.data) == 300_000)
    program.end()
    # Both have said all there is: the device closes the connection by itself.
    bench.wait(lambda: guest.is_reset)
    assert guest.data == random_bytes(300_000)
    bench.wait(lambda: bench.open_count() == 0)


def test_half_close_works_in_the_other_direction_too(bench: Bench) -> None:
    program, guest = bench.open_to_host(7777)
    guest.send(b"question")
    guest.shutdown(pk.SHUTDOWN_SEND)
    bench.wait(lambda: program.is_ended)
    program.send(b"answer")
    program.close()
    bench.wait(lambda: guest.is_reset)
    assert guest.data == b"answer"


def test_guest_that_receives_no_more_breaks_the_hosts_pipe(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.shutdown(pk.SHUTDOWN_RECEIVE)
    bench.settle()
    program.send(b"x")
    bench.wait(lambda: program.is_broken)
    guest.send(b"but I still speak")
    bench.wait(lambda: program.data == b"but I still speak")


def test_host_that_receives_no_more_is_told_to_the_guest(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    program.sock.shutdown(socket.SHUT_RD)
    guest.send(b"x")
    bench.wait(lambda: guest.heard & pk.SHUTDOWN_RECEIVE)
    program.send(b"but I still speak")
    bench.wait(lambda: guest.data == b"but I still speak")


def test_host_close_is_told_to_the_guest(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.close()
    bench.wait(lambda: guest.is_reset)
    assert guest.heard == pk.SHUTDOWN_BOTH
    bench.settle()
    bench.wait(lambda: bench.open_count() == 0)


def test_host_close_after_many_bytes_loses_none(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.is_reading = False
    data = random_bytes(400_000)
    program.send(data)
    bench.wait(lambda: not program.outbox or len(guest.unread) >= 262144)
    guest.is_reading = True
    guest.read()
    bench.wait(lambda: not program.outbox)
    program.close()
    bench.wait(lambda: guest.is_reset)
    assert guest.data == data


def test_host_end_needs_no_credit(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.is_reading = False
    program.send(bytes(262144))
    bench.wait(lambda: len(guest.unread) == 262144)
    bench.settle()
    program.end()
    bench.wait(lambda: guest.heard == pk.SHUTDOWN_SEND)
    program.close()
    bench.wait(lambda: guest.heard == pk.SHUTDOWN_BOTH)


def test_host_close_with_unread_bytes_resets_the_guest(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    guest.send(b"never read")
    bench.wait(lambda: not guest.outbox)
    bench.settle()
    program.send(b"last words")
    program.close()
    bench.wait(lambda: guest.is_reset)
    assert guest.data == b"last words"
    bench.wait(lambda: bench.open_count() == 0)


def test_guest_close_is_acknowledged_although_the_host_reads_slowly(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    program.is_reading = False
    data = random_bytes(262144)
    guest.send(data)
    guest.close()
    bench.wait(lambda: guest.is_reset)
    program.is_reading = True
    bench.wait(lambda: program.is_ended)
    assert program.data == data
    bench.wait(lambda: bench.open_count() == 0)


def test_guest_rst_delivers_what_came_before_it(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.send(b"before")
    guest.say(pk.OP_RST)
    bench.wait(lambda: program.is_ended)
    assert program.data == b"before"


def test_credit_request_is_answered(bench: Bench) -> None:
    _program, guest = bench.open_to_guest(9001)
    guest.say(pk.OP_CREDIT_REQUEST)
    bench.wait(lambda: bench.driver.received[-1].op == pk.OP_CREDIT_UPDATE)
    assert bench.driver.received[-1].buf_alloc == FIRST_WINDOW_BYTES


def count_busy(bench: Bench) -> int:
    """Tx buffers that the device has not given back."""
    bench.driver.tx.take_used()
    return fd.RING_SIZE - len(bench.driver.tx.free)


def test_buffers_of_credit_updates_come_back_without_other_packets(bench: Bench) -> None:
    _program, guest = bench.open_to_guest(9001)
    for count in (1, 5, 60):
        for _ in range(count):
            guest.say(pk.OP_CREDIT_UPDATE)
        bench.wait(lambda: count_busy(bench) == 0)


def test_buffers_of_credit_updates_come_back_with_the_next_packet(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    interrupts = bench.driver.tx.interrupts
    for _ in range(50):
        guest.say(pk.OP_CREDIT_UPDATE)
        guest.send(b"x")
        bench.wait_for_data(program, b"x" * (len(program.data) + 1))
    bench.wait(lambda: count_busy(bench) == 0)
    assert bench.driver.tx.interrupts - interrupts < 100


def test_nothing_is_held_over_a_stop(bench: Bench) -> None:
    _program, guest = bench.open_to_guest(9001)
    for _ in range(3):
        guest.say(pk.OP_CREDIT_UPDATE)
    _rx_base, tx_base = bench.driver.stop()
    assert tx_base == bench.driver.tx.avail_idx
    assert count_busy(bench) == 0


CUTS: dict[str, dict[str, Any]] = {
    "single": {"rx_cut": fd.RX_SINGLE},
    "split": {"rx_cut": fd.RX_SPLIT, "rx_buffers": 60},
    "split-indirect": {"rx_cut": fd.RX_SPLIT, "is_rx_indirect": True},
    "odd-indirect": {"rx_cut": fd.RX_ODD, "is_rx_indirect": True, "tx_cut": (3, 50, 1000), "is_tx_indirect": True},
    "odd": {"rx_cut": fd.RX_ODD, "rx_buffers": 20, "tx_cut": (44, 1, 4096, 4096)},
    "one-buffer": {"rx_cut": fd.RX_SINGLE, "rx_buffers": 1},
    "small-credit": {"rx_cut": fd.RX_SINGLE, "buf_alloc": 5000},
    "large-credit": {"rx_cut": fd.RX_SINGLE, "buf_alloc": 4 * 1024 * 1024},
    "no-event-idx": {"features": fd.ALL_FEATURES & ~fd.F_EVENT_IDX},
    "no-indirect": {"features": fd.ALL_FEATURES & ~fd.F_INDIRECT},
    "plain": {"features": fd.F_VERSION_1 | fd.F_PROTOCOL, "rx_cut": fd.RX_SPLIT, "rx_buffers": 32},
}


@pytest.mark.parametrize("name", CUTS)
def test_both_ways_at_once_with_hashes(name: str) -> None:
    with open_bench() as bench:
        bench.use_driver(**CUTS[name]).boot()
        program, guest = bench.open_to_guest(9001)
        size = 300_000 if name in {"small-credit", "one-buffer"} else 1_500_000
        down, up = random_bytes(size, 2), random_bytes(size, 3)
        program.send(down)
        program.end()
        guest.send(up)
        guest.shutdown(pk.SHUTDOWN_SEND)
        bench.wait(lambda: guest.is_ended and program.is_ended, timeout_s=60)
        assert hashlib.sha256(guest.data).digest() == hashlib.sha256(down).digest()
        assert hashlib.sha256(program.data).digest() == hashlib.sha256(up).digest()
        bench.wait(lambda: guest.is_reset)
        bench.wait(lambda: bench.open_count() == 0)


def test_event_idx_saves_kicks(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    before = bench.driver.rx.kicks
    program.send(bytes(1_000_000))
    bench.wait(lambda: len(guest.data) == 1_000_000)
    # 265 packets; a kick of the rx ring is only wanted when it had run dry.
    assert bench.driver.rx.kicks - before < 50


def test_slow_host_reader_blocks_only_its_own_connection(bench: Bench) -> None:
    slow, slow_guest = bench.open_to_guest(9001)
    slow.is_reading = False
    slow_guest.send(random_bytes(2_000_000))
    bench.wait(lambda: slow_guest.credit == 0)
    quick, quick_guest = bench.open_to_guest(9002)
    for i in range(20):
        quick_guest.send(b"%d" % i)
        bench.wait_for_data(quick, b"%d" % i)
    assert len(slow_guest.outbox) > 1_000_000
    slow.is_reading = True
    bench.wait(lambda: len(slow.data) == 2_000_000)
    assert slow.data == random_bytes(2_000_000)


def test_slow_guest_reader_blocks_only_its_own_connection(bench: Bench) -> None:
    slow, slow_guest = bench.open_to_guest(9001)
    slow_guest.is_reading = False
    slow.send(random_bytes(2_000_000))
    bench.wait(lambda: len(slow_guest.unread) == 262144)
    quick, quick_guest = bench.open_to_guest(9002)
    for i in range(20):
        quick.send(b"%d" % i)
        bench.wait_for_data(quick_guest, b"%d" % i)
    assert len(slow_guest.unread) == 262144
    slow_guest.is_reading = True
    slow_guest.read()
    bench.wait(lambda: len(slow_guest.data) == 2_000_000)
    assert slow_guest.data == random_bytes(2_000_000)


def test_missing_credit_is_asked_for(bench: Bench) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.is_reading = False
    program.send(bytes(300_000))
    bench.wait(lambda: len(guest.unread) == 262144)
    # The guest reads, and its update is lost: nothing but a question brings it back.
    guest.fwd_cnt += len(guest.unread)
    guest.data += guest.unread
    guest.unread = b""
    guest.is_reading = True
    bench.wait(lambda: len(guest.data) == 300_000)
    assert any(header.op == pk.OP_CREDIT_REQUEST for header in bench.driver.received)


def test_three_hundred_connections_at_once(bench: Bench) -> None:
    bench.driver.listen(9001)
    programs = [bench.connect() for _ in range(300)]
    for program in programs:
        program.send(b"CONNECT 9001\n")
    bench.wait(lambda: all(b"\n" in program.data for program in programs))
    guests = {guest.host_port: guest for guest in bench.driver.listening[9001]}
    assert len(guests) == 300
    for program in programs:
        program.data.clear()
        program.send(b"%d" % id(program))
    bench.wait(lambda: all(guest.data for guest in guests.values()))
    for guest in guests.values():
        guest.send(bytes(guest.data))
    bench.wait(lambda: all(program.data for program in programs))
    assert all(program.data == b"%d" % id(program) for program in programs)
    bench.wait(lambda: bench.open_count() == 300)
    for program in programs:
        program.close()
    bench.wait(lambda: not bench.driver.sockets)
    bench.settle()
    bench.wait(lambda: bench.open_count() == 0)


def test_guest_that_comes_in_crowds_waits_for_a_full_backlog(bench: Bench) -> None:
    listener = bench.listen(7777, backlog=2)
    guests = [bench.driver.dial(7777) for _ in range(10)]
    bench.settle()
    programs = [bench.accept(listener) for _ in guests]
    bench.wait(lambda: all(guest.is_open for guest in guests))
    assert len(programs) == 10
