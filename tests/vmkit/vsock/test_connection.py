"""One connection's life, as transcripts: what the guest says and the host program does, and what comes of it."""

from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.vsock import packet as pk
from vmkit.vsock.connection import ConnectionEvent, GuestError, LifecycleError, State, VsockConnection

WINDOW = 1000


def say(op: int, **fields: int) -> pk.Header:
    base = pk.Header(3, 2, 100, 200, 0, pk.TYPE_STREAM, op, 0, 5000, 0)
    return base._replace(**fields)


def make(state: State) -> VsockConnection:
    """A connection brought to this state by the ways that lead there."""
    if state in {State.DIALING, State.OPEN, State.CLOSING}:
        connection = VsockConnection(3, WINDOW, State.DIALING)
        connection.guest_port, connection.host_port = 100, 200
        connection.send.update(5000, 0)
        if state is not State.DIALING:
            connection.accept()
            assert connection.next_packet().op == pk.OP_RESPONSE
        if state is State.CLOSING:
            connection.end(pk.SHUTDOWN_BOTH)
            connection.next_packet()
        return connection
    connection = VsockConnection(3, WINDOW, State.GREETING)
    connection.guest_port = 100
    if state in {State.WAITING, State.REQUESTED}:
        connection.await_driver()
    if state is State.REQUESTED:
        connection.request(200)
        assert connection.next_packet().op == pk.OP_REQUEST
    if state is State.GONE:
        connection.abandon()
    return connection


def drain(connection: VsockConnection) -> list[tuple[int, int]]:
    packets = []
    while connection.has_packet():
        header = connection.next_packet()
        packets.append((header.op, header.flags))
    return packets


def test_request_and_response_carry_addresses_and_credit() -> None:
    connection = VsockConnection(7, WINDOW, State.GREETING)
    connection.await_driver()
    connection.guest_port = 9001
    connection.request(2**30)
    assert connection.next_packet() == pk.Header(2, 7, 2**30, 9001, 0, 1, pk.OP_REQUEST, 0, WINDOW, 0)
    assert connection.receive_packet(say(pk.OP_RESPONSE, buf_alloc=4096), 0) == (ConnectionEvent.ANSWERED,)
    assert connection.is_flowing()
    assert connection.send.free() == 4096


TRANSITIONS = [
    (State.REQUESTED, say(pk.OP_RESPONSE), State.OPEN, (ConnectionEvent.ANSWERED,)),
    (State.REQUESTED, say(pk.OP_RST), State.GONE, (ConnectionEvent.GONE,)),
    (State.DIALING, say(pk.OP_RST), State.GONE, (ConnectionEvent.GONE,)),
    (State.OPEN, say(pk.OP_RW, length=5), State.OPEN, (ConnectionEvent.DATA,)),
    (State.OPEN, say(pk.OP_RW), State.OPEN, ()),
    (State.OPEN, say(pk.OP_CREDIT_UPDATE), State.OPEN, ()),
    (State.OPEN, say(pk.OP_CREDIT_REQUEST), State.OPEN, (ConnectionEvent.WAKE,)),
    (State.OPEN, say(pk.OP_SHUTDOWN), State.OPEN, ()),
    (State.OPEN, say(pk.OP_SHUTDOWN, flags=1), State.OPEN, (ConnectionEvent.GUEST_DEAF,)),
    (State.OPEN, say(pk.OP_SHUTDOWN, flags=2), State.OPEN, (ConnectionEvent.GUEST_ENDED,)),
    (State.OPEN, say(pk.OP_SHUTDOWN, flags=3), State.GONE, (ConnectionEvent.GONE, ConnectionEvent.RESET)),
    (State.OPEN, say(pk.OP_SHUTDOWN, flags=0xFFFFFFF0), State.OPEN, ()),
    (State.OPEN, say(pk.OP_RST), State.GONE, (ConnectionEvent.GONE,)),
    (State.CLOSING, say(pk.OP_RW, length=5), State.CLOSING, ()),
    (State.CLOSING, say(pk.OP_CREDIT_UPDATE), State.CLOSING, ()),
    (State.CLOSING, say(pk.OP_CREDIT_REQUEST), State.CLOSING, ()),
    (State.CLOSING, say(pk.OP_SHUTDOWN, flags=2), State.CLOSING, ()),
    (State.CLOSING, say(pk.OP_SHUTDOWN, flags=3), State.GONE, (ConnectionEvent.GONE, ConnectionEvent.RESET)),
    (State.CLOSING, say(pk.OP_RST), State.GONE, (ConnectionEvent.GONE,)),
]


@pytest.mark.parametrize(("state", "header", "next_state", "events"), TRANSITIONS)
def test_connection_follows_its_table(
    state: State, header: pk.Header, next_state: State, events: tuple[ConnectionEvent, ...]
) -> None:
    connection = make(state)
    assert connection.receive_packet(header, header.length) == events
    assert connection.state is next_state


ALLOWED = {(state, header.op) for state, header, _, _ in TRANSITIONS}


@pytest.mark.parametrize(("state", "op"), [pair for pair in product(State, range(9)) if pair not in ALLOWED])
def test_connection_refuses_everything_else_and_stays_as_it_is(state: State, op: int) -> None:
    connection = make(state)
    before = snapshot(connection)
    with pytest.raises(GuestError):
        connection.receive_packet(say(op, buf_alloc=1, fwd_cnt=9), 0)
    assert snapshot(connection) == before


def snapshot(connection: VsockConnection) -> tuple[object, ...]:
    send, receive = connection.send, connection.receive
    credit = (send.sent, send.peer_buf_alloc, send.peer_fwd_cnt, receive.pending, receive.fwd_cnt)
    return connection.state, connection.told, connection.heard, connection.has_packet(), credit


@pytest.mark.parametrize(
    ("header", "payload", "text"),
    [
        (say(pk.OP_RW, length=10), 9, "in a buffer of 9"),
        (say(pk.OP_RW, length=WINDOW + 1), WINDOW + 1, "beyond its credit"),
        (say(pk.OP_RW, length=2**32 - 1), 2**32 - 1, "beyond its credit"),
    ],
)
def test_connection_refuses_wrong_lengths(header: pk.Header, payload: int, text: str) -> None:
    connection = make(State.OPEN)
    before = snapshot(connection)
    with pytest.raises(GuestError, match=text):
        connection.receive_packet(header, payload)
    assert snapshot(connection) == before


def test_connection_refuses_bytes_after_the_guests_end() -> None:
    connection = make(State.OPEN)
    connection.receive_packet(say(pk.OP_SHUTDOWN, flags=2), 0)
    with pytest.raises(GuestError, match="after SHUTDOWN"):
        connection.receive_packet(say(pk.OP_RW, length=1), 1)


HOST_CALLS: dict[str, tuple[Callable[[VsockConnection], object], set[State]]] = {
    "await_driver": (lambda c: c.await_driver(), {State.GREETING, State.REQUESTED}),
    "request": (lambda c: c.request(1), {State.WAITING}),
    "accept": (lambda c: c.accept(), {State.DIALING}),
    "end": (lambda c: c.end(pk.SHUTDOWN_SEND), {State.OPEN}),
    "probe": (lambda c: c.probe_credit(), {State.OPEN}),
}


@pytest.mark.parametrize(("name", "state"), list(product(HOST_CALLS, State)))
def test_driver_mistakes_are_named_and_change_nothing(name: str, state: State) -> None:
    call, allowed = HOST_CALLS[name]
    connection = make(state)
    before = snapshot(connection)
    if state in allowed:
        call(connection)
        return
    with pytest.raises(LifecycleError, match="needs a connection"):
        call(connection)
    assert snapshot(connection) == before


def test_asking_for_a_packet_that_is_not_owed_is_a_mistake() -> None:
    with pytest.raises(LifecycleError):
        make(State.OPEN).next_packet()


@pytest.mark.parametrize(
    ("state", "is_known"),
    [
        (State.GREETING, False),
        (State.WAITING, False),
        (State.REQUESTED, True),
        (State.DIALING, True),
        (State.OPEN, True),
        (State.CLOSING, True),
        (State.GONE, False),
    ],
)
def test_abandoning_says_whether_the_guest_must_hear_of_it(state: State, is_known: bool) -> None:
    connection = make(state)
    assert connection.abandon() is is_known
    assert connection.state is State.GONE
    assert not connection.has_packet()


def test_request_that_was_never_sent_needs_no_reset() -> None:
    connection = make(State.WAITING)
    connection.request(200)
    assert not connection.abandon()


def test_host_ends_one_way_then_the_other() -> None:
    connection = make(State.OPEN)
    assert connection.end(pk.SHUTDOWN_SEND)
    assert drain(connection) == [(pk.OP_SHUTDOWN, 2)]
    assert not connection.is_flowing()
    assert not connection.end(pk.SHUTDOWN_SEND)
    assert connection.receive_packet(say(pk.OP_RW, length=5), 5) == (ConnectionEvent.DATA,)
    assert connection.end(pk.SHUTDOWN_BOTH)
    assert connection.state is State.CLOSING
    assert drain(connection) == [(pk.OP_SHUTDOWN, 3)]


def test_both_ends_one_after_the_other_make_the_guests_end() -> None:
    connection = make(State.OPEN)
    assert connection.receive_packet(say(pk.OP_SHUTDOWN, flags=1), 0) == (ConnectionEvent.GUEST_DEAF,)
    assert not connection.is_flowing()
    assert connection.receive_packet(say(pk.OP_SHUTDOWN, flags=1), 0) == ()
    assert connection.receive_packet(say(pk.OP_SHUTDOWN, flags=2), 0) == (ConnectionEvent.GONE, ConnectionEvent.RESET)


def test_packets_come_in_the_order_the_guest_must_see_them() -> None:
    connection = VsockConnection(3, WINDOW, State.DIALING)
    connection.accept()
    connection.receive_packet(say(pk.OP_CREDIT_REQUEST), 0)
    connection.probe_credit()
    connection.end(pk.SHUTDOWN_SEND)
    # The RESPONSE carries the credit that was asked for.
    assert [op for op, _ in drain(connection)] == [pk.OP_RESPONSE, pk.OP_CREDIT_REQUEST, pk.OP_SHUTDOWN]


def test_credit_update_is_owed_for_delivered_bytes_and_settled_by_any_packet() -> None:
    connection = make(State.OPEN)
    connection.receive_packet(say(pk.OP_RW, length=600), 600)
    assert connection.deliver(600)
    header = connection.render_header(pk.OP_RW, length=1)
    assert header.fwd_cnt == 600
    assert not connection.has_packet()
    connection.receive_packet(say(pk.OP_RW, length=600), 600)
    assert not connection.deliver(100)
    assert connection.deliver(500)
    assert connection.next_packet()[6:] == (pk.OP_CREDIT_UPDATE, 0, WINDOW, 1200)


def test_guest_that_ended_needs_no_credit() -> None:
    connection = make(State.OPEN)
    connection.receive_packet(say(pk.OP_RW, length=600), 600)
    connection.receive_packet(say(pk.OP_SHUTDOWN, flags=2), 0)
    assert not connection.deliver(600)


GUEST_SAYS = st.builds(
    say,
    st.integers(0, 9),
    length=st.integers(0, 1500),
    flags=st.integers(0, 4),
    buf_alloc=st.integers(0, 2**32 - 1),
    fwd_cnt=st.integers(0, 2**32 - 1),
)
HOST_DOES = st.sampled_from(["accept", "end1", "end2", "end3", "deliver", "packet", "abandon", "probe"])


@given(st.lists(GUEST_SAYS | HOST_DOES, max_size=60))
def test_connection_keeps_its_invariants_under_any_transcript(turns: list[pk.Header | str]) -> None:
    connection = VsockConnection(3, WINDOW, State.DIALING)
    told = heard = 0
    for turn in turns:
        try:
            play(connection, turn)
        except (GuestError, LifecycleError):
            continue
        receive = connection.receive
        assert 0 <= receive.pending <= WINDOW
        assert connection.told & told == told and connection.heard & heard == heard
        told, heard = connection.told, connection.heard
        assert (connection.state is State.CLOSING) <= (told == pk.SHUTDOWN_BOTH)
        assert (heard == pk.SHUTDOWN_BOTH) <= (connection.state is State.GONE)
        assert connection.send.free() >= 0


def play(connection: VsockConnection, turn: pk.Header | str) -> None:
    match turn:
        case pk.Header():
            connection.receive_packet(turn, turn.length)
        case "accept":
            connection.accept()
        case "deliver":
            connection.deliver(connection.receive.pending)
        case "packet":
            if connection.has_packet():
                header = connection.next_packet()
                assert header.fwd_cnt == connection.receive.fwd_cnt
        case "abandon":
            connection.abandon()
        case "probe":
            connection.probe_credit()
        case _:
            connection.end(int(turn[-1]))


def test_answer_to_a_question_that_was_not_asked_yet_is_a_violation() -> None:
    """The host's ports can be guessed; a guest must not open a connection before its REQUEST has gone out."""
    connection = make(State.WAITING)
    connection.request(200)
    for op in (pk.OP_RESPONSE, pk.OP_RST):
        with pytest.raises(GuestError, match="before REQUEST"):
            connection.receive_packet(say(op), 0)
    assert connection.state is State.REQUESTED
    assert drain(connection) == [(pk.OP_REQUEST, 0)]
    connection.receive_packet(say(pk.OP_RESPONSE), 0)
    assert connection.is_open()


@pytest.mark.parametrize("last", [say(pk.OP_RST), say(pk.OP_SHUTDOWN, flags=pk.SHUTDOWN_BOTH)])
@pytest.mark.parametrize("state", [State.OPEN, State.CLOSING])
def test_connection_that_is_over_owes_nothing(state: State, last: pk.Header) -> None:
    """The guest may use the ports again at once: what was owed to the old connection must not reach the new one."""
    connection = make(State.OPEN)
    connection.receive_packet(say(pk.OP_CREDIT_REQUEST), 0)
    connection.end(pk.SHUTDOWN_SEND if state is State.OPEN else pk.SHUTDOWN_BOTH)
    assert connection.has_packet()
    connection.receive_packet(last, 0)
    assert connection.state is State.GONE
    assert not connection.has_packet()
