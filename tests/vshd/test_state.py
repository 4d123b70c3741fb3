"""The state table: what leads where, and that everything else is refused without a trace."""

import itertools
from collections.abc import Callable

import pytest

from tests.vshd.joined import Joined
from vshd.wire import state
from vshd.wire.errors import LocalProtocolError
from vshd.wire.messages import Failure, SetupConnectionRequest

STEPS = (
    state.SEND_SETUP,
    state.CHALLENGE,
    state.GO_ON,
    state.REQUEST,
    state.ACCEPT,
    state.HAND_OVER,
    state.REFUSE,
    state.END,
)
STATES = (
    state.OPENING,
    state.AWAITING_RESPONSE,
    state.AWAITING_SETUP,
    state.AWAITING_PROOF,
    state.DEFERRED,
    state.PREPARING,
    state.RUNNING,
    state.RAW,
    state.OVER,
    state.BROKEN,
)


@pytest.mark.parametrize("table", [state.CLIENT, state.SERVER], ids=["client", "server"])
def test_every_step_is_in_the_table_or_refused(table: dict[tuple[str, str], str]) -> None:
    for now, step in itertools.product(STATES, STEPS):
        if (now, step) in table:
            assert state.next_state(table, now, step) == table[now, step]
        else:
            with pytest.raises(LocalProtocolError, match=now):
                state.next_state(table, now, step)


@pytest.mark.parametrize("table", [state.CLIENT, state.SERVER], ids=["client", "server"])
def test_every_state_leads_to_the_end(table: dict[tuple[str, str], str]) -> None:
    for now in {pair[0] for pair in table}:
        reached, frontier = set(), {now}
        while frontier:
            reached |= frontier
            frontier = {after for (before, _), after in table.items() if before in frontier} - reached
        assert state.OVER in reached


def test_wrong_calls_change_nothing() -> None:
    joined = Joined()
    with pytest.raises(LocalProtocolError):
        joined.server.accept(1)
    assert (joined.server.output.size, joined.server.state) == (0, state.AWAITING_SETUP)
    joined.establish()
    calls: tuple[Callable[[], object], ...] = (
        lambda: joined.client.send_setup(SetupConnectionRequest(argv=[b"x"])),
        lambda: joined.server.accept(1),
        lambda: joined.server.refuse("no", Failure()),
    )
    for call in calls:
        with pytest.raises(LocalProtocolError):
            call()
        assert joined.client.state == joined.server.state == state.RUNNING


def test_nothing_is_sent_before_the_session_runs() -> None:
    joined = Joined()
    assert joined.client.send_room(1) == 0
    joined.client.send_end(1)
    joined.client.send_resize(1, 1)
    assert not joined.client.send_signal(2)
    assert joined.client.output.size == 0
