"""How many machines a keeper makes at once, and what it does after one that could not be made."""

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import vmkit
from vmkit.errors import MachineError, NameInUseError
from vmkit.machine.start import Started
from vmkit.pool.keeper import Keeper, Order
from vsh.errors import VshError

SIZE = 4


class RunningMonitor:
    def poll(self) -> None:
        """It never ends here."""


@dataclass
class MadeMachine:
    name: str
    monitor: RunningMonitor


class Workshop(Keeper):
    """A keeper whose machines are made when the test has them made."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(Order(vmkit.MachineSpec(), "p", size, 0))
        self.making: list[asyncio.Future[Started]] = []
        self.counts: list[int] = []

    async def _make(self, count: int) -> Started:
        self.counts.append(count)
        made: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
        self.making.append(made)
        return await made

    def finish(self) -> None:
        """Makes the machine that was begun first."""
        name = f"p-{len(self.counts)}-{len(self.making)}"
        self.making.pop(0).set_result(cast("Started", MadeMachine(name, RunningMonitor())))

    def fail(self, error: VshError) -> None:
        self.making.pop(0).set_exception(error)


async def settle() -> None:
    """Lets the keeper do all that it can do now."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_machines_are_made_side_by_side_until_one_waits() -> None:
    async def story() -> list[int]:
        keeper = Workshop()
        making = asyncio.create_task(keeper._make_missing(2))
        seen = []
        for _ in range(SIZE):
            await settle()
            seen.append(len(keeper.making))
            keeper.finish()
        assert await making is None
        assert keeper.counts[:2] == [1, 2]
        return seen

    # Two at once; the second one is still being made when the first one waits, and the others follow one by one.
    assert asyncio.run(story()) == [2, 1, 1, 1]


def test_client_that_asks_meanwhile_gets_one_of_its_own() -> None:
    async def story() -> int:
        keeper = Workshop(size=1)
        making = asyncio.create_task(keeper._make_missing(2))
        await settle()
        assert len(keeper.making) == 1
        given: list[str] = []
        for _ in range(2):
            keeper._stock.ask(given.append)
        keeper._room.set()
        await settle()
        assert len(keeper.making) == 2
        keeper.finish()
        keeper.finish()
        await settle()
        # Both are promised: the pool's own is missing until the clients have taken theirs.
        assert await making is None
        return len(given)

    assert asyncio.run(story()) == 2


def test_failure_begins_no_other_and_keeps_what_was_made_beside_it() -> None:
    async def story() -> tuple[str, int]:
        keeper = Workshop()
        making = asyncio.create_task(keeper._make_missing(3))
        await settle()
        assert len(keeper.making) == 3
        keeper.fail(MachineError("no room"))
        keeper.fail(NameInUseError("p-2 is taken"))
        await settle()
        assert len(keeper.making) == 1
        keeper.finish()
        error: Any = await making
        return error.brief, len(keeper._stock.waiting)

    assert asyncio.run(story()) == ("no room", 1)


def test_end_of_the_pool_ends_the_making() -> None:
    async def story() -> list[bool]:
        keeper = Workshop()
        making = asyncio.create_task(keeper._make_missing(2))
        await settle()
        making.cancel()
        await settle()
        return [one.cancelled() for one in keeper.making]

    assert asyncio.run(story()) == [True, True]
