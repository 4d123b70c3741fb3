"""Receive buffers with room for a header and no byte: they carry every packet but data, and stop nothing."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench, open_bench
from tests.vmkit.vsock.fake_driver import WAIT_S
from vmkit.vsock import packet as pk

MIXES = {
    "every other": (fd.RX_HEADER, fd.RX_SINGLE),
    "one large in ten": (*[fd.RX_HEADER] * 9, fd.RX_ODD),
    "one small in ten": (*[fd.RX_SPLIT] * 9, fd.RX_HEADER_SPLIT),
}


@pytest.fixture(params=[fd.RX_HEADER, fd.RX_HEADER_SPLIT])
def small(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A guest all of whose receive buffers have 44 bytes."""
    with open_bench() as bench:
        bench.use_driver(rx_cut=request.param, rx_buffers=20).boot()
        yield bench


def wait_asleep(bench: Bench) -> None:
    """Until the device sleeps: one that turns in circles never does."""
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{bench.process.pid}/stat").read_text().rpartition(") ")[2][0] != "S":
        assert time.monotonic() < deadline, "the device does not sleep"


def test_buffers_of_a_header_carry_every_packet_but_data(small: Bench) -> None:
    program, guest = small.open_to_guest(9001)
    guest.send(bytes(1_000_000))
    small.wait(lambda: len(program.data) == 1_000_000)
    guest.say(pk.OP_CREDIT_REQUEST)
    program.end()
    small.wait(lambda: guest.heard == pk.SHUTDOWN_SEND)
    guest.close()
    small.wait(lambda: guest.is_reset and program.is_ended)
    dialled, answer = small.open_to_host(7777)
    answer.send(b"x")
    small.wait(lambda: dialled.data == b"x")
    ops = {header.op for header in small.driver.received}
    assert ops == {pk.OP_REQUEST, pk.OP_RESPONSE, pk.OP_RST, pk.OP_SHUTDOWN, pk.OP_CREDIT_UPDATE}
    assert "device-broken" not in small.log()


def test_bytes_wait_for_larger_buffers_and_keep_nothing_else_waiting(small: Bench) -> None:
    waiting, unread = small.open_to_guest(9001)
    waiting.send(b"these bytes")
    small.settle()
    wait_asleep(small)
    small.driver.received.clear()
    other, guest = small.open_to_guest(9002)
    guest.send(b"alive")
    small.wait(lambda: other.data == b"alive")
    # Fillers would only make the guest give such buffers again. A round of them comes only where the guest gives back a
    # buffer between the device's two looks at the ring: it could have been a larger one.
    ops = [header.op for header in small.driver.received]
    assert ops[0] == pk.OP_REQUEST
    assert set(ops[1:]) <= {pk.OP_CREDIT_UPDATE}
    wait_asleep(small)
    area = small.driver.ram.allocate(4096)
    head = small.driver.rx.add([(area, 4096)], is_writable=True)
    small.driver.rx_pieces[head] = [(area, 4096)]
    small.driver.rx.kick()
    small.wait(lambda: unread.data == b"these bytes")
    wait_asleep(small)


def test_waiting_bytes_outlive_a_pause_and_go_with_a_reset(small: Bench) -> None:
    program, _unread = small.open_to_guest(9001)
    program.send(b"x")
    small.settle()
    small.driver.start(small.driver.stop())
    small.settle()
    wait_asleep(small)
    assert not program.is_ended
    small.driver.reboot()
    program.read_to_end()
    small.wait(lambda: small.open_count() == 0)


@pytest.mark.parametrize("name", MIXES)
def test_small_buffers_among_larger_ones_lose_no_byte(name: str) -> None:
    with open_bench() as bench:
        bench.use_driver(rx_cuts=MIXES[name], rx_buffers=20).boot()
        program, guest = bench.open_to_guest(9001)
        data = bytes(range(256)) * 1000
        program.send(data)
        program.end()
        guest.send(data)
        bench.wait(lambda: guest.is_ended and len(program.data) == len(data))
        assert guest.data == data and program.data == data


def test_buffer_smaller_than_a_header_breaks_the_ring(bench: Bench) -> None:
    bench.use_driver(rx_cut=(43,), rx_buffers=2).boot()
    program = bench.connect()
    program.send(b"CONNECT 9001\n")
    bench.wait_log("without room for a header")
    bench.use_driver().boot()
    bench.driver.listen(9001)
    assert program.line().startswith(b"OK ")
