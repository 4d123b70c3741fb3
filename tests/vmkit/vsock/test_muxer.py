"""Which packet belongs to which connection, who may have one, and what is refused."""

from typing import Any

import pytest

from vmkit.vsock import muxer as mx
from vmkit.vsock import packet as pk
from vmkit.vsock.connection import ConnectionEvent, State, VsockConnection


class Room:
    """A muxer and what it said."""

    def __init__(self, **options: Any) -> None:
        self.said: list[str] = []
        self.muxer = mx.Muxer(3, lambda kind, _text: self.said.append(kind), **options)

    def receive(self, op: int, **fields: int) -> tuple[VsockConnection | None, tuple[ConnectionEvent, ...]]:
        header = pk.Header(3, 2, 100, 200, 0, pk.TYPE_STREAM, op, 0, 5000, 0)._replace(**fields)
        return self.muxer.receive(header, header.length)

    def strays(self) -> list[pk.Header]:
        headers = []
        while self.muxer.strays:
            headers.append(self.muxer.next_stray())
        return headers

    def open_from_guest(self, **fields: int) -> VsockConnection:
        connection, events = self.receive(pk.OP_REQUEST, **fields)
        assert connection is not None and events == (ConnectionEvent.DIAL,)
        connection.accept()
        connection.next_packet()
        return connection

    def open_from_host(self) -> VsockConnection:
        connection = self.waiting()
        self.muxer.request(connection, 9001)
        assert connection.next_packet().op == pk.OP_REQUEST
        _, events = self.receive(pk.OP_RESPONSE, src_port=9001, dst_port=connection.host_port)
        assert events == (ConnectionEvent.ANSWERED,)
        return connection

    def waiting(self) -> VsockConnection:
        connection = self.muxer.admit()
        assert connection is not None
        connection.await_driver()
        return connection


@pytest.fixture
def room() -> Room:
    return Room()


def test_host_ports_are_high_and_never_shared(room: Room) -> None:
    room.muxer._next_host_port = mx.LAST_HOST_PORT
    first, second = room.waiting(), room.waiting()
    room.muxer.request(first, 9001)
    room.muxer.request(second, 9001)
    assert (first.host_port, second.host_port) == (mx.LAST_HOST_PORT, mx.FIRST_HOST_PORT)
    # Once around, and the port is still taken for that guest port.
    room.muxer._next_host_port = mx.LAST_HOST_PORT
    third = room.waiting()
    room.muxer.request(third, 9001)
    assert third.host_port == mx.FIRST_HOST_PORT + 1


def test_packets_find_their_connection_by_both_ports(room: Room) -> None:
    first = room.open_from_guest(src_port=1, dst_port=7)
    second = room.open_from_guest(src_port=2, dst_port=7)
    third = room.open_from_guest(src_port=1, dst_port=8)
    for connection, source, destination in ((first, 1, 7), (second, 2, 7), (third, 1, 8)):
        found, events = room.receive(pk.OP_RW, src_port=source, dst_port=destination, length=3)
        assert found is connection and events == (ConnectionEvent.DATA,)


def test_answer_to_a_request_finds_the_host_program(room: Room) -> None:
    connection = room.waiting()
    room.muxer.request(connection, 9001)
    assert connection.next_packet().op == pk.OP_REQUEST
    found, events = room.receive(pk.OP_RESPONSE, src_port=9001, dst_port=connection.host_port)
    assert found is connection and events == (ConnectionEvent.ANSWERED,)


@pytest.mark.parametrize(
    ("fields", "said", "answer"),
    [
        ({"src_cid": 4}, "dropped-source", None),
        ({"src_cid": 2}, "dropped-source", None),
        ({"dst_cid": 1}, "refused-destination", (1, 3, 200, 100, 1)),
        ({"dst_cid": 3}, "refused-destination", (3, 3, 200, 100, 1)),
        ({"type": 2}, "refused-type", (2, 3, 200, 100, 2)),
    ],
)
def test_foreign_packets_are_refused(
    room: Room, fields: dict[str, int], said: str, answer: tuple[int, ...] | None
) -> None:
    assert room.receive(pk.OP_REQUEST, **fields) == (None, ())
    assert room.said == [said]
    strays = room.strays()
    if answer is None:
        assert strays == []
    else:
        src_cid, dst_cid, src_port, dst_port, kind = answer
        assert strays == [pk.Header(src_cid, dst_cid, src_port, dst_port, 0, kind, pk.OP_RST, 0, 0, 0)]


@pytest.mark.parametrize("fields", [{}, {"dst_cid": 1}, {"type": 2}])
def test_rst_is_never_answered(room: Room, fields: dict[str, int]) -> None:
    room.receive(pk.OP_RST, **fields)
    assert room.strays() == []


def test_forged_destination_does_not_reach_an_open_connection(room: Room) -> None:
    connection = room.open_from_guest()
    assert room.receive(pk.OP_RST, dst_cid=1) == (None, ())
    assert room.receive(pk.OP_RST, src_cid=9) == (None, ())
    assert room.receive(pk.OP_RST, type=2) == (None, ())
    assert connection.state is State.OPEN


@pytest.mark.parametrize(("source", "is_refused"), [(0, False), (1023, False), (1024, True), (2**32 - 1, True)])
def test_privileged_port_asks_for_a_privileged_source(source: int, is_refused: bool) -> None:
    room = Room(privileged_ports=[7777])
    connection, _events = room.receive(pk.OP_REQUEST, src_port=source, dst_port=7777)
    assert (connection is None) is is_refused
    assert len(room.strays()) == is_refused
    other, _events = room.receive(pk.OP_REQUEST, src_port=source, dst_port=7778)
    assert other is not None


def test_violation_ends_the_connection_with_a_reset(room: Room) -> None:
    connection = room.open_from_guest()
    assert room.receive(pk.OP_RESPONSE) == (connection, (ConnectionEvent.GONE,))
    assert connection.state is State.GONE
    assert [header.op for header in room.strays()] == [pk.OP_RST]
    assert room.said == ["violation"]
    # Its ports are free again.
    assert room.open_from_guest() is not connection


def test_guest_that_is_done_hears_rst_and_its_ports_are_free(room: Room) -> None:
    connection = room.open_from_guest()
    found, events = room.receive(pk.OP_SHUTDOWN, flags=3)
    assert found is connection and ConnectionEvent.GONE in events
    assert [header.op for header in room.strays()] == [pk.OP_RST]
    room.receive(pk.OP_RW, length=1)
    assert len(room.strays()) == 1


def test_closing_connection_gives_way_to_a_new_one(room: Room) -> None:
    old = room.open_from_guest()
    old.end(pk.SHUTDOWN_BOTH)
    room.muxer.dismiss(old)
    new, events = room.receive(pk.OP_REQUEST)
    assert new is not old and events == (ConnectionEvent.DIAL,)
    assert old.state is State.GONE
    assert room.strays() == []


def test_places_are_limited_and_come_back() -> None:
    room = Room(max_connections=2)
    first = room.open_from_guest(src_port=1)
    assert room.muxer.admit() is not None
    assert room.muxer.admit() is None
    assert room.receive(pk.OP_REQUEST, src_port=2) == (None, ())
    assert len(room.strays()) == 1
    assert room.said == ["refused-full", "refused-full"]
    room.muxer.abandon(first)
    room.muxer.dismiss(first)
    room.muxer.dismiss(first)
    assert room.muxer.member_count == 1
    assert room.muxer.admit() is not None


def test_last_places_are_for_host_programs() -> None:
    room = Room(max_connections=32)
    for port in range(30):
        room.open_from_guest(src_port=port)
    assert room.receive(pk.OP_REQUEST, src_port=30) == (None, ())
    assert [header.op for header in room.strays()] == [pk.OP_RST]
    hosts = [room.open_from_host() for _ in range(2)]
    assert room.muxer.is_full and room.muxer.admit() is None
    assert room.said == ["refused-full", "refused-full"]
    # A place that a host program leaves is a host program's again.
    room.muxer.abandon(hosts[0])
    room.muxer.dismiss(hosts[0])
    assert room.receive(pk.OP_REQUEST, src_port=31) == (None, ())
    room.open_from_host()


def test_windows_are_small_at_first_and_wide_for_bulk_within_the_budget() -> None:
    room = Room()
    assert mx.MAX_CONNECTIONS * mx.FIRST_WINDOW_BYTES < mx.WINDOW_BUDGET_BYTES
    members = [room.open_from_host() for _ in range(mx.MAX_CONNECTIONS)]
    assert {member.receive.window for member in members} == {mx.FIRST_WINDOW_BYTES}
    for member in members:
        if room.muxer.widen(member):
            # The guest may wait with the old window: it is told at once.
            assert member.next_packet()[6:] == (pk.OP_CREDIT_UPDATE, 0, mx.WINDOW_BYTES, 0)
    windows = [member.receive.window for member in members]
    assert mx.WINDOW_BUDGET_BYTES - mx.WINDOW_BYTES < sum(windows) <= mx.WINDOW_BUDGET_BYTES
    assert windows.count(mx.WINDOW_BYTES) == 136
    # A place that becomes free gives its window back, once.
    for gone in (members[0], members[500]):
        room.muxer.abandon(gone)
        room.muxer.dismiss(gone)
        room.muxer.dismiss(gone)
    assert room.muxer.widen(members[600])
    assert not room.muxer.widen(members[601])


def test_every_window_is_wide_where_there_are_few_places() -> None:
    room = Room(max_connections=20)
    members = [room.open_from_host() for _ in range(20)]
    assert all(room.muxer.widen(member) for member in members)


def test_strays_are_told_once_and_bounded(room: Room) -> None:
    for _ in range(3):
        room.receive(pk.OP_RW, length=1)
    assert len(room.strays()) == 1
    for port in range(5000):
        room.receive(pk.OP_RW, src_port=port)
        assert room.muxer.is_clogged == (port + 1 >= mx.MAX_STRAY_RESETS)
    assert len(room.strays()) == mx.STRAY_RESETS_CEILING
    assert not room.muxer.is_clogged


def test_withdrawn_request_waits_for_the_next_driver(room: Room) -> None:
    connection = room.waiting()
    room.muxer.request(connection, 9001)
    room.muxer.withdraw(connection)
    assert connection.state is State.WAITING
    assert room.muxer.connections() == [connection]
    room.receive(pk.OP_RESPONSE, src_port=9001, dst_port=connection.host_port)
    assert len(room.strays()) == 1
