"""Which cell is next: retries, too many failures, and that no cell is lost or run twice."""

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmkit.matrix.results import CellFault
from vmkit.matrix.schedule import Policy, Schedule


def test_cell_whose_machine_failed_runs_again_behind_the_others() -> None:
    schedule = Schedule([0, 1], Policy(retries=1))
    assert schedule.take() == 0
    assert schedule.finish(0, CellFault.MACHINE)
    assert [schedule.take(), schedule.take(), schedule.take()] == [1, 0, None]
    assert not schedule.finish(0, CellFault.MACHINE)
    assert not schedule.finish(1, CellFault.NONE)
    assert schedule.is_over
    assert schedule.done == {0: CellFault.MACHINE, 1: CellFault.NONE}


def test_test_that_failed_and_time_that_was_over_are_not_repeated() -> None:
    schedule = Schedule([0, 1], Policy(retries=5))
    for number, fault in enumerate((CellFault.TEST, CellFault.TIME)):
        assert schedule.take() == number
        assert not schedule.finish(number, fault)


def test_too_many_failures_drop_the_rest_and_say_so() -> None:
    schedule = Schedule(range(5), Policy(max_failures=2))
    for _ in range(2):
        number = schedule.take()
        assert number is not None
        schedule.finish(number, CellFault.TEST)
    assert (schedule.take(), schedule.dropped, schedule.is_over) == (None, [2, 3, 4], True)
    assert schedule.stopped == "2 cells failed, and --max-failures is 2"


def test_cell_is_not_repeated_after_too_many_failures() -> None:
    """The last two run at once: when one fails, the other must not start again."""
    schedule = Schedule(range(2), Policy(retries=3, max_failures=1))
    assert [schedule.take(), schedule.take()] == [0, 1]
    assert not schedule.finish(0, CellFault.TEST)
    assert not schedule.finish(1, CellFault.MACHINE)
    assert schedule.is_over
    assert schedule.done == {0: CellFault.TEST, 1: CellFault.MACHINE}


def test_failure_of_the_last_cell_stops_nothing() -> None:
    schedule = Schedule([0], Policy(max_failures=1))
    assert schedule.take() == 0
    schedule.finish(0, CellFault.TEST)
    assert (schedule.stopped, schedule.dropped) == ("", [])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(
    cells=st.integers(0, 30),
    jobs=st.integers(1, 5),
    policy=st.builds(Policy, st.integers(0, 3), st.one_of(st.none(), st.integers(1, 6))),
    data=st.data(),
)
def test_each_cell_is_done_or_dropped_once(cells: int, jobs: int, policy: Policy, data: st.DataObject) -> None:
    schedule = Schedule(range(cells), policy)
    tries: Counter[int] = Counter()
    while not schedule.is_over:
        while len(schedule.running) < jobs and (taken := schedule.take()) is not None:
            tries[taken] += 1
        number = data.draw(st.sampled_from(sorted(schedule.running)))
        schedule.finish(number, data.draw(st.sampled_from(list(CellFault))))
        if data.draw(st.integers(0, 20)) == 0:
            schedule.stop("the deadline")
    assert sorted([*schedule.done, *schedule.dropped]) == list(range(cells))
    assert all(count <= 1 + policy.retries for count in tries.values())
    if policy.max_failures is not None and not schedule.dropped:
        assert schedule.failures <= policy.max_failures + jobs or not schedule.stopped
