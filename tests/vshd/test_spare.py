"""When a spare is due, and which process becomes it. Time is given, and channels are real."""

from collections.abc import Iterator

import pytest

from vshd.spare import DELAY_S, SERVING_MAX, Spare, Spares, is_waited_for, make_channel

SPARE_TIME_S = 10.0


class Process:
    """A process of a session, which looks at its end of the channel alone."""

    def __init__(self, pid: int) -> None:
        ours, self.channel = make_channel()
        self.spare = Spare(pid, ours)

    def is_dismissed(self) -> bool:
        return is_waited_for(self.channel) and self.channel.recv(1) == b""


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made = [Process(pid) for pid in range(100, 100 + SERVING_MAX + 2)]
    yield made
    for process in made:
        process.spare.dismiss()
        process.channel.close()


@pytest.fixture
def spares() -> Spares:
    return Spares(SPARE_TIME_S)


def test_idle_daemon_waits_for_nothing(spares: Spares) -> None:
    assert spares.find_wait(5.0) is None
    assert not spares.is_due(5.0)
    assert not spares.is_over(5.0)


def test_spare_is_due_a_moment_after_a_connection_that_took_the_last(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    spares.add(processes[0].spare, 5.0)
    assert spares.is_missed()
    assert not spares.is_due(5.0)
    wait_ms = spares.find_wait(5.0)
    assert wait_ms is not None
    assert wait_ms == pytest.approx(DELAY_S * 1000 + 1)
    assert spares.is_due(5.0 + wait_ms / 1000)


def test_process_that_is_free_again_is_the_spare_and_none_is_due(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    spares.add(processes[0].spare, 5.0)
    free = spares.take_back(processes[0].spare.pid)
    assert free is processes[0].spare
    spares.keep(free, 5.05)
    assert not spares.is_missed()
    assert not processes[0].is_dismissed()


def test_process_that_has_served_takes_the_place_of_a_fresh_one(spares: Spares, processes: list[Process]) -> None:
    served, fresh = processes[:2]
    spares.expect(5.0)
    spares.keep(fresh.spare, 5.1)
    spares.keep(served.spare, 5.2)
    assert fresh.is_dismissed()
    assert not served.is_dismissed()


def test_after_the_last_connection_no_spare_is_kept(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    spares.keep(processes[0].spare, 5.1)
    assert not spares.is_over(5.0 + SPARE_TIME_S - 0.1)
    assert spares.is_over(5.0 + SPARE_TIME_S)
    spares.dismiss()
    assert processes[0].is_dismissed()
    assert spares.find_wait(99.0) is None
    # One that ends its session later is not kept.
    spares.keep(processes[1].spare, 99.0)
    assert processes[1].is_dismissed()


def test_oldest_of_many_that_serve_will_serve_no_other(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    for process in processes[: SERVING_MAX + 1]:
        spares.add(process.spare, 5.0)
    assert [process.is_dismissed() for process in processes] == [True] + [False] * (SERVING_MAX + 1)
    assert spares.take_back(processes[0].spare.pid) is None


def test_process_that_has_ended_is_no_spare(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    spares.keep(processes[0].spare, 5.0)
    spares.forget(processes[0].spare.pid)
    assert spares.hand_over(processes[1].channel.fileno(), "a client") is None


def test_frozen_machine_dismisses_all(spares: Spares, processes: list[Process]) -> None:
    spares.expect(5.0)
    spares.add(processes[0].spare, 5.0)
    spares.keep(processes[1].spare, 5.0)
    spares.dismiss_all()
    assert processes[0].is_dismissed()
    assert processes[1].is_dismissed()
