"""The monitor's way with a guest's clock: a service of vshd behind a socket pair, and a QEMU of two verbs."""

import asyncio
import json
import os
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from tests.vsh.live import DEADLINE_S
from tests.vshd.test_clock import Served, serving
from vmkit.errors import MachineError
from vmkit.monitor.clock import TOLERANCE_NS, ClockKeeper, GuestPaused
from vmkit.monitor.logs import EventLog
from vmkit.monitor.qmp import Qmp
from vsh.clock import GuestClock
from vsh.errors import Unreachable, VshError

SECOND_NS = 10**9


class Verbs(Qmp):
    """QEMU as far as a pause needs it. fails: the verb that it refuses."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.done: list[str] = []
        self.on_cont: Callable[[], None] = lambda: None

    async def execute(self, name: str, arguments: object = None) -> object:
        if name == self.fails:
            raise MachineError(f"QEMU refused '{name}'")
        self.done.append(name)
        if name == "cont":
            self.on_cont()
        return {}


def run(
    path: Path, work: Callable[[ClockKeeper, Served], Coroutine[None, None, None]], ahead_ns: int = 0
) -> list[dict[str, object]]:
    """Runs work with the clock of a guest that is so far ahead; returns the events."""

    async def main(served: Served, events: EventLog) -> None:
        clock = ClockKeeper(lambda: GuestClock(os.dup(served.client.fileno()), "m", DEADLINE_S), events)
        try:
            await work(clock, served)
        finally:
            await clock.close()

    events = EventLog(path)
    with serving() as served:
        served.ahead_ns = ahead_ns
        asyncio.run(main(served, events))
    events.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("ahead_ns", "is_set"), [(-SECOND_NS, True), (3600 * SECOND_NS, True), (TOLERANCE_NS // 2, False)]
)
def test_clock_is_set_where_it_is_off(tmp_path: Path, ahead_ns: int, is_set: bool) -> None:
    async def work(clock: ClockKeeper, served: Served) -> None:
        await clock.correct()
        assert bool(served.seen) == is_set
        after = await clock.measure()
        assert abs(after.ahead_ns) <= TOLERANCE_NS + after.error_ns

    events = run(tmp_path / "events", work, ahead_ns)
    assert [event["event"] for event in events] == ["clock-set"] * is_set


def test_paused_guest_gets_its_time_when_it_runs_again(tmp_path: Path) -> None:
    async def work(clock: ClockKeeper, served: Served) -> None:
        qemu = Verbs()
        await clock.pause(qemu)
        served.ahead_ns = -100 * SECOND_NS
        late = await (await clock.resume(qemu))
        assert qemu.done == ["stop", "cont"]
        assert abs(late.ahead_ns + 100 * SECOND_NS) < SECOND_NS
        assert abs(served.ahead_ns) < SECOND_NS

    assert run(tmp_path / "events", work) == []


def test_exchange_that_meets_a_pause_is_not_begun(tmp_path: Path) -> None:
    async def work(clock: ClockKeeper, served: Served) -> None:
        qemu = Verbs()
        _, corrected, measured = await asyncio.gather(
            clock.pause(qemu), clock.correct(), clock.measure(), return_exceptions=True
        )
        assert isinstance(corrected, GuestPaused)
        assert isinstance(measured, GuestPaused)
        await (await clock.resume(qemu))
        await clock.correct()

    assert run(tmp_path / "events", work) == []


@pytest.mark.parametrize("verb", ["stop", "cont"])
def test_verb_that_qemu_refuses_changes_nothing(tmp_path: Path, verb: str) -> None:
    async def work(clock: ClockKeeper, served: Served) -> None:
        qemu = Verbs(fails=verb)
        with pytest.raises(MachineError):
            await clock.pause(qemu)
            await clock.resume(qemu)
        assert qemu.done == ["stop"] * (verb == "cont")

    run(tmp_path / "events", work)


def test_guest_without_the_service_is_paused_all_the_same(tmp_path: Path) -> None:
    def refuse() -> GuestClock:
        raise Unreachable("nothing listens")

    async def main() -> None:
        events = EventLog(tmp_path / "events")
        clock, qemu = ClockKeeper(refuse, events), Verbs()
        await clock.pause(qemu)
        setting = await clock.resume(qemu)
        with pytest.raises(VshError, match="nothing listens"):
            await setting
        assert qemu.done == ["stop", "cont"]
        events.close()

    asyncio.run(main())


def test_connection_that_broke_is_made_anew(tmp_path: Path) -> None:
    async def main(first: Served, second: Served) -> None:
        opened = [first, second]
        events = EventLog(tmp_path / "events")
        clock = ClockKeeper(lambda: GuestClock(os.dup(opened.pop(0).client.fileno()), "m", DEADLINE_S), events)
        await clock.measure()
        first.client.shutdown(2)
        with pytest.raises(VshError):
            await clock.measure()
        await clock.measure()
        assert opened == []
        await clock.close()
        events.close()

    with serving() as first, serving() as second:
        asyncio.run(main(first, second))
