"""Faults that users ask for, through the real device process: what guest and host program see of each."""

import time
from collections.abc import Iterator

import pytest

from tests.vmkit.vsock import fake_driver as fd
from tests.vmkit.vsock.device_process import Bench
from vmkit.errors import MachineError
from vmkit.packets.control import DeviceControl, open_control
from vmkit.vsock import packet as pk
from vmkit.vsock.control import KILLED_STATUS
from vmkit.vsock.faults import MAX_FAULTS
from vmkit.vsock.requests import TO_GUEST, TO_HOST, Clear, Fault, Kill, ListFaults, RequestError, parse_request


@pytest.fixture
def control(bench: Bench) -> Iterator[DeviceControl]:
    """A user's program at the device's control socket."""
    with open_control(bench.control_path) as control:
        yield control


def begin(control: DeviceControl, kind: str, **fields: object) -> Fault:
    (fault,) = control.ask_faults(parse_request(b"fault " + render(kind, fields)))
    return fault


def render(kind: str, fields: dict[str, object]) -> bytes:
    return " ".join([f"kind={kind}", *(f"{name}={value}" for name, value in fields.items())]).encode()


# refuse


def test_refused_program_is_closed_without_an_answer_and_the_next_one_connects(
    bench: Bench, control: DeviceControl
) -> None:
    begin(control, "refuse", ports=9001, times=2)
    bench.driver.listen(9001)
    for _ in range(2):
        program = bench.connect()
        program.send(b"CONNECT 9001\n")
        program.read_to_end()
        assert not program.data
    assert control.ask(ListFaults()) == []
    bench.open_to_guest(9001)


def test_refused_guest_is_reset_and_other_ports_are_not(bench: Bench, control: DeviceControl) -> None:
    begin(control, "refuse", ports=600, direction=TO_HOST)
    bench.listen(600)
    sock = bench.driver.dial(600)
    bench.wait_for_reset(sock)
    bench.open_to_host(601)
    assert [fault.hits for fault in control.ask_faults(ListFaults())] == [1]


def test_refusal_of_one_direction_leaves_the_other(bench: Bench, control: DeviceControl) -> None:
    begin(control, "refuse", direction=TO_GUEST)
    bench.open_to_host(600)
    program = bench.connect()
    program.send(b"CONNECT 9001\n")
    bench.wait(lambda: program.is_ended)


# reset


def test_reset_ends_the_connections_of_the_port_alone(bench: Bench, control: DeviceControl) -> None:
    hit_program, hit = bench.open_to_guest(9001)
    program, guest = bench.open_to_guest(9002)
    assert begin(control, "reset", ports=9001).hits == 1
    bench.wait_for_reset(hit)
    bench.wait(lambda: hit_program.is_ended)
    program.send(b"still here")
    bench.wait_for_data(guest, b"still here")
    assert control.ask(ListFaults()) == []


@pytest.mark.parametrize("direction", [TO_GUEST, TO_HOST])
def test_reset_after_bytes_is_exact_in_each_direction(bench: Bench, control: DeviceControl, direction: str) -> None:
    begin(control, "reset", direction=direction, after=70_000, times=1)
    program, guest = bench.open_to_guest(9001)
    data = bytes(range(256)) * 400
    if direction == TO_GUEST:
        program.send(data)
        bench.wait_for_reset(guest)
        assert guest.data == data[:70_000]
    else:
        guest.send(data)
        bench.wait(lambda: program.is_ended)
        assert program.data == data[:70_000]
    # The fault is used up.
    other, other_guest = bench.open_to_guest(9002)
    other.send(data)
    bench.wait(lambda: other_guest.data == data)


def test_reset_after_nothing_resets_each_new_connection(bench: Bench, control: DeviceControl) -> None:
    begin(control, "reset", after=0)
    for _ in range(2):
        _program, guest = bench.open_to_guest(9001)
        bench.wait_for_reset(guest)
    assert [fault.hits for fault in control.ask_faults(ListFaults())] == [2]


def test_reset_after_both_directions_counts_their_sum(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "reset", after=10)
    program.send(b"123456")
    bench.wait_for_data(guest, b"123456")
    guest.send(b"7890123")
    bench.wait(lambda: program.is_ended)
    assert program.data == b"7890"


# half-close


def test_half_close_to_guest_ends_its_input_alone(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "half-close", direction=TO_GUEST)
    bench.wait(lambda: guest.heard & pk.SHUTDOWN_SEND)
    guest.send(b"still heard")
    bench.wait_for_data(program, b"still heard")
    program.send(b"lost")
    bench.wait(lambda: program.is_broken)


def test_half_close_to_host_ends_its_input_after_the_last_byte(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    guest.send(b"before")
    bench.wait_for_data(program, b"before")
    begin(control, "half-close", direction=TO_HOST)
    bench.wait(lambda: program.is_ended)
    assert program.data == b"before"
    bench.wait(lambda: guest.heard & pk.SHUTDOWN_RECEIVE)
    program.send(b"still heard")
    bench.wait_for_data(guest, b"still heard")


def test_half_close_to_host_after_bytes_loses_the_rest(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "half-close", direction=TO_HOST, after=5)
    guest.send(b"12345678")
    bench.wait(lambda: program.is_ended)
    assert program.data == b"12345"
    program.send(b"still heard")
    bench.wait_for_data(guest, b"still heard")


def test_half_close_to_guest_after_bytes_is_exact(bench: Bench, control: DeviceControl) -> None:
    begin(control, "half-close", direction=TO_GUEST, after=5)
    program, guest = bench.open_to_guest(9001)
    program.send(b"12345678")
    bench.wait(lambda: guest.is_ended)
    assert guest.data == b"12345"
    guest.send(b"still heard")
    bench.wait_for_data(program, b"still heard")


# freeze-credit


def test_frozen_credit_to_host_stops_a_guest_that_has_used_its_window(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    fault = begin(control, "freeze-credit", direction=TO_HOST)
    data = bytes(range(256)) * 1000
    guest.send(data)
    window = guest.peer_buf_alloc
    # All that was sent arrives, and not a byte more.
    bench.wait(lambda: len(program.data) == window)
    bench.settle()
    assert len(program.data) == window < len(data)
    control.ask(Clear(fault.number))
    bench.wait(lambda: program.data == data)


def test_frozen_credit_to_guest_stops_the_program_and_thaws(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "freeze-credit", direction=TO_GUEST)
    data = bytes(range(256)) * 4000
    program.send(data)
    bench.wait(lambda: len(guest.data) == bench.driver.buf_alloc)
    bench.settle()
    assert len(guest.data) == bench.driver.buf_alloc < len(data)
    control.ask(Clear())
    bench.wait(lambda: guest.data == data)


def test_guest_that_ignores_frozen_credit_is_reset(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "freeze-credit", direction=TO_HOST)
    window = guest.peer_buf_alloc
    guest.send(b"x" * window)
    bench.wait(lambda: len(program.data) == window)
    guest.say(pk.OP_RW, b"y")
    bench.driver.flush()
    bench.wait_for_reset(guest)


# delay and rate: the bytes are what counts; how long it took is checked from below alone


@pytest.mark.parametrize("direction", [TO_GUEST, TO_HOST])
def test_delay_holds_bytes_back_and_loses_none(bench: Bench, control: DeviceControl, direction: str) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "delay", delay_ms=150, direction=direction)
    sender, receiver = (program, guest) if direction == TO_GUEST else (guest, program)
    began = time.monotonic()
    sender.send(b"a" * 100_000 + b"end")
    bench.wait(lambda: receiver.data.endswith(b"end"))
    assert time.monotonic() - began >= 0.15
    assert receiver.data == b"a" * 100_000 + b"end"
    # The other direction is not held.
    receiver.send(b"answer")
    bench.wait_for_data(sender, b"answer")


@pytest.mark.parametrize("direction", [TO_GUEST, TO_HOST])
def test_rate_lets_bytes_through_in_portions(bench: Bench, control: DeviceControl, direction: str) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "rate", bytes_s=200_000, direction=direction)
    sender, receiver = (program, guest) if direction == TO_GUEST else (guest, program)
    data = bytes(range(256)) * 250
    began = time.monotonic()
    sender.send(data)
    bench.wait(lambda: receiver.data == data)
    # The first portion is free.
    assert time.monotonic() - began >= (len(data) - 4000) / 200_000


def test_end_comes_after_the_bytes_that_are_held_back(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "delay", delay_ms=100)
    program.send(b"last words")
    program.end()
    bench.wait(lambda: guest.is_ended)
    assert guest.data == b"last words"
    guest.send(b"answer")
    guest.shutdown(pk.SHUTDOWN_BOTH)
    bench.wait(lambda: program.is_ended)
    assert program.data == b"answer"


def test_cleared_delay_gives_the_bytes_at_once_and_the_plain_socket_back(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    begin(control, "delay", delay_ms=60_000)
    program.send(b"to guest")
    guest.send(b"to host")
    bench.settle()
    assert not guest.data and not program.data
    control.ask(Clear())
    bench.wait(lambda: guest.data == b"to guest" and program.data == b"to host")
    data = b"z" * 500_000
    program.send(data)
    bench.wait(lambda: guest.data.endswith(data))


@pytest.mark.parametrize(("times", "hits"), [(0, 3), (2, 2)])
def test_fault_hits_the_open_connections_up_to_its_number(
    bench: Bench, control: DeviceControl, times: int, hits: int
) -> None:
    pairs = [bench.open_to_guest(9001) for _ in range(3)]
    assert begin(control, "delay", delay_ms=60_000, times=times).hits == hits
    for number, (program, _guest) in enumerate(pairs):
        program.send(b"%d" % number)
    for number, (_program, guest) in enumerate(pairs[hits:], start=hits):
        bench.wait_for_data(guest, b"%d" % number)
    bench.settle()
    assert [bytes(guest.data) for _program, guest in pairs[:hits]] == [b""] * hits
    # It is used up, or still there for those that come; a clear ends it on the open ones in both cases.
    control.ask(Clear())
    bench.wait(lambda: all(guest.data for _program, guest in pairs))


def test_faults_together_and_one_cleared(bench: Bench, control: DeviceControl) -> None:
    program, guest = bench.open_to_guest(9001)
    slow = begin(control, "delay", delay_ms=60_000, direction=TO_GUEST)
    begin(control, "rate", bytes_s=10_000_000)
    program.send(b"waits")
    bench.settle()
    assert not guest.data
    control.ask(Clear(slow.number))
    bench.wait_for_data(guest, b"waits")
    assert [fault.kind for fault in control.ask_faults(ListFaults())] == ["rate"]


# the control socket


def test_kill_ends_the_process_at_once() -> None:
    from tests.vmkit.vsock.device_process import open_bench  # noqa: PLC0415

    with pytest.raises(AssertionError), open_bench() as bench:
        bench.driver.boot()
        with open_control(bench.control_path) as control:
            assert control.ask(Kill()) == []
        assert bench.process.wait(fd.WAIT_S) == KILLED_STATUS


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b"fault",
        b"fault kind=delay",
        b"fault kind=delay delay_ms=-1",
        b"fault kind=delay delay_ms=60001",
        b"fault kind=reset delay_ms=1",
        b"fault kind=half-close",
        b"trace ports=x",
        b"clear number=77",
        b"\xff",
    ],
)
def test_bad_request_is_refused_and_changes_nothing(bench: Bench, control: DeviceControl, line: bytes) -> None:
    control._sock.sendall(line + b"\n")
    assert control._read_line().startswith(b"error ")
    assert control.ask(ListFaults()) == []


def test_faults_are_limited_in_number(bench: Bench, control: DeviceControl) -> None:
    for _ in range(MAX_FAULTS):
        begin(control, "refuse")
    with pytest.raises(MachineError, match="32 faults are active"):
        begin(control, "refuse")
    assert control.ask(Clear()) == [b"cleared 32"]
    bench.open_to_guest(9001)


def test_line_without_end_closes_the_program_alone(bench: Bench, control: DeviceControl) -> None:
    control._sock.sendall(b"x" * 5000)
    with pytest.raises(MachineError):
        control.ask(ListFaults())
    bench.open_to_guest(9001)


def test_request_of_a_fault_without_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="needs a kind"):
        parse_request(b"fault ports=1")
