"""How often the monitor replaces a companion."""

from vmkit.monitor.companion import Restarts


def test_restarts_are_limited_within_a_period_and_not_over_a_life() -> None:
    now_s = 0.0
    restarts = Restarts(limit=3, period_s=60, clock=lambda: now_s)
    for _ in range(100):
        assert restarts.take()
        now_s += 21
    now_s += 60
    assert [restarts.take() for _ in range(5)] == [True, True, True, False, False]
    now_s += 59.9
    assert not restarts.take()
    now_s += 0.2
    assert [restarts.take() for _ in range(4)] == [True, True, True, False]
