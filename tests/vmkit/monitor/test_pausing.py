"""The states of a guest that is stopped: which request each takes, who owns it, and a record that cannot be written."""

import asyncio
from pathlib import Path

import pytest

from tests.vmkit.monitor.test_clock import Verbs
from vmkit.machine.words import Answer, MeasureClock, Park, Pause, Resume, Take
from vmkit.monitor.clock import ClockKeeper
from vmkit.monitor.logs import EventLog
from vmkit.monitor.pausing import Pausing
from vsh.clock import GuestClock
from vsh.errors import Unreachable

Asked = Pause | Resume | MeasureClock | Park | Take


class Machine:
    """A machine without a clock. `states` are those of its record, `owners` those that it was given to."""

    def __init__(self, folder: Path) -> None:
        self.states: list[str] = []
        self.owners: list[int] = []
        self.is_full = False
        self.qemu = Verbs()
        self.pausing = Pausing("m", ClockKeeper(self.connect, EventLog(folder / "events")), self.write, self.adopt)

    def connect(self) -> GuestClock:
        raise Unreachable("nothing listens")

    def write(self, state: str) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.states.append(state)

    def adopt(self, owner: int) -> None:
        if owner == 404:
            raise ProcessLookupError(3, "No such process")
        self.owners.append(owner)

    async def ask(self, *requests: Asked) -> list[Answer]:
        return [await self.pausing.answer(request, self.qemu) for request in requests]


def test_paused_guest_is_resumed_and_parked_one_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path)
        answers = await machine.ask(Pause(), Pause(), Resume(), Resume(), Park(), Take(7))
        assert [answer.ok for answer in answers] == [True] * 6
        assert machine.qemu.done == ["stop", "cont", "stop", "cont"]
        assert [state for state in machine.states if state != "ready"] == ["paused", "paused", "pooled"]
        assert machine.states[-1] == "ready"
        assert machine.owners == [7]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("before", "asked", "state"),
    [
        (Pause(), Take(), "paused"),
        (Pause(), Park(), "paused"),
        (Pause(), MeasureClock(), "paused"),
        (Park(), Resume(), "pooled"),
        (Park(), Pause(), "pooled"),
        (Resume(), Take(), "ready"),
    ],
)
def test_request_of_another_state_is_refused(tmp_path: Path, before: Asked, asked: Asked, state: str) -> None:
    async def main() -> None:
        machine = Machine(tmp_path)
        _, answer = await machine.ask(before, asked)
        assert (answer.ok, answer.error) == (False, f"'m' is {state}")
        assert machine.owners == []

    asyncio.run(main())


def test_owner_that_is_gone_gets_no_machine(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path)
        _, answer, again = await machine.ask(Park(), Take(404), Take(7))
        assert answer.error == "cannot watch the process 404: No such process"
        assert again.ok
        assert machine.owners == [7]

    asyncio.run(main())


@pytest.mark.parametrize(("before", "asked"), [(Pause(), Resume()), (Park(), Take(7))])
def test_record_that_cannot_be_written_is_an_error_and_written_later(
    tmp_path: Path, before: Asked, asked: Asked
) -> None:
    async def main() -> None:
        machine = Machine(tmp_path)
        await machine.ask(before)
        machine.is_full = True
        (answer,) = await machine.ask(asked)
        assert not answer.ok
        assert answer.error == "cannot write the record of 'm': No space left on device"
        machine.is_full = False
        (answer,) = await machine.ask(Resume())
        assert answer.ok
        assert machine.states[-1] == "ready"

    asyncio.run(main())


def test_guest_that_stopped_by_itself_is_resumed_or_stops_again(tmp_path: Path) -> None:
    async def main() -> None:
        machine = Machine(tmp_path)
        machine.pausing.note_stop("the disk is full")
        assert (machine.states[-1], machine.pausing.trouble) == ("paused", "the disk is full")
        # Nothing was made room: QEMU stops the guest as soon as it runs.
        machine.qemu.on_cont = lambda: machine.pausing.note_stop("the disk is full")
        (answer,) = await machine.ask(Resume())
        assert (answer.ok, answer.error) == (False, "'m' has stopped again: the disk is full")
        assert machine.states[-1] == "paused"
        machine.qemu.on_cont = lambda: None
        (answer,) = await machine.ask(Resume())
        assert answer.ok
        assert (machine.states[-1], machine.pausing.trouble) == ("ready", "")

    asyncio.run(main())
