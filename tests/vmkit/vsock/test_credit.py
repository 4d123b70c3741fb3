"""Credit, modulo 2**32."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmkit.vsock.credit import MODULUS, ReceiveCredit, SendCredit

U32 = st.integers(0, MODULUS - 1)


@pytest.mark.parametrize(
    ("sent", "buf_alloc", "fwd_cnt", "free"),
    [
        (0, 0, 0, 0),
        (0, 1000, 0, 1000),
        (400, 1000, 0, 600),
        (400, 1000, 400, 1000),
        (1000, 1000, 0, 0),
        # The guest shrank its buffer below what is on its way.
        (1000, 500, 0, 0),
        # The counters wrapped.
        (5, 1000, MODULUS - 5, 990),
        # The guest claims bytes that were never sent.
        (0, 1000, 1, 0),
        (0, MODULUS - 1, MODULUS - 1, MODULUS - 2),
    ],
)
def test_send_credit_is_what_the_guest_has_room_for(sent: int, buf_alloc: int, fwd_cnt: int, free: int) -> None:
    credit = SendCredit()
    credit.spend(sent)
    credit.update(buf_alloc, fwd_cnt)
    assert credit.free() == free


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 100_000))), U32, st.integers(0, 2**20))
def test_send_credit_never_lets_more_out_than_the_window(
    steps: list[tuple[int, int]], start: int, buf_alloc: int
) -> None:
    credit = SendCredit()
    credit.spend(start)
    taken = start
    credit.update(buf_alloc, taken)
    on_way = 0
    for wanted, wish in steps:
        size = min(wanted, credit.free())
        credit.spend(size)
        on_way += size
        assert 0 <= on_way <= buf_alloc
        consumed = min(wish, on_way)
        on_way -= consumed
        taken = (taken + consumed) % MODULUS
        credit.update(buf_alloc, taken)
        assert credit.free() == buf_alloc - on_way


def test_receive_credit_refuses_what_does_not_fit_and_changes_nothing() -> None:
    credit = ReceiveCredit(100)
    assert credit.accept(60)
    assert not credit.accept(41)
    assert credit.pending == 60
    assert credit.accept(40)
    credit.deliver(100)
    assert (credit.pending, credit.fwd_cnt) == (0, 100)


def test_receive_credit_counts_wrap() -> None:
    credit = ReceiveCredit(100)
    credit.fwd_cnt = credit.told_fwd_cnt = MODULUS - 10
    assert credit.accept(60)
    credit.deliver(60)
    assert credit.fwd_cnt == 50
    assert credit.is_update_due(100)
    assert credit.tell() == 50
    assert not credit.is_update_due(100)


@pytest.mark.parametrize(
    ("window", "peer_buf_alloc", "freed", "is_due"),
    [
        (262144, 262144, 131071, False),
        (262144, 262144, 131072, True),
        # The guest keeps to the smaller of both buffers: half of a larger one would never come.
        (1048576, 262144, 131072, True),
        (262144, 1048576, 131072, True),
        # A guest with a tiny buffer of its own, or that never told one, hears at once; but nothing new is no news.
        (262144, 1, 1, True),
        (262144, 0, 1, True),
        (262144, 0, 0, False),
    ],
)
def test_credit_update_is_due_at_half_of_the_smaller_buffer(
    window: int, peer_buf_alloc: int, freed: int, is_due: bool
) -> None:
    credit = ReceiveCredit(window)
    assert credit.accept(freed)
    credit.deliver(freed)
    assert credit.is_update_due(peer_buf_alloc) is is_due
