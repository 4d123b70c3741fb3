"""What the parts of a monitor share: the first end wins, a part that fails is an end, steps are given up at the end."""

import asyncio
import gc

import pytest

from vmkit.errors import HostError, MachineError
from vmkit.monitor import life as life_module
from vmkit.monitor.end import End
from vmkit.monitor.life import EndedError, Life, explain_failure
from vsh.errors import VshError

FIRST, SECOND = End("first", "1"), End("second", "2")


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def fail(error: Exception) -> None:
    raise error


def test_first_end_wins() -> None:
    async def main() -> End:
        life = Life()
        life.finish(FIRST)
        life.finish(SECOND)
        return await life.end

    assert asyncio.run(main()) is FIRST


def test_task_that_fails_is_the_end() -> None:
    async def main() -> End:
        life = Life()
        life.spawn(never())
        life.spawn(fail(OSError(24, "Too many open files")))
        end = await life.end
        await life.cancel_all()
        assert len(asyncio.all_tasks()) == 1
        return end

    end = asyncio.run(main())
    assert end.brief == "the machine's monitor failed: Too many open files"
    assert not end.expected


def test_task_that_is_cancelled_or_done_is_no_end() -> None:
    async def main() -> None:
        life = Life()
        life.spawn(never()).cancel()
        life.spawn(asyncio.sleep(0))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not life.end.done()
        assert not life._tasks

    asyncio.run(main())


def test_step_is_given_up_when_the_end_comes() -> None:
    async def main() -> None:
        life = Life()
        asyncio.get_running_loop().call_soon(life.finish, FIRST)
        with pytest.raises(EndedError) as caught:
            await life.or_end(never())
        assert caught.value.end is FIRST
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_step_that_fails_because_of_the_end_is_explained_by_it() -> None:
    """QMP breaks off a moment before QEMU's exit is seen."""

    async def main() -> None:
        life = Life()
        asyncio.get_running_loop().call_later(0.02, life.finish, FIRST)
        with pytest.raises(EndedError):
            await life.or_end(fail(MachineError("QEMU does not answer")))

    asyncio.run(main())


def test_step_that_fails_alone_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life_module, "CAUSE_DEADLINE_S", 0.01)

    async def main() -> None:
        life = Life()
        with pytest.raises(MachineError, match="refused"):
            await life.or_end(fail(MachineError("QEMU refused it")))
        assert not life.end.done()
        await life.or_end(asyncio.sleep(0))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "reason", "brief"),
    [
        (EndedError(SECOND), "second", "2"),
        (HostError("no QEMU", hint="install it"), "start-failed", "no QEMU"),
        (VshError("no vsock"), "start-failed", "no vsock"),
        (OSError(28, "No space left on device", "/x/y"), "monitor-error", "/x/y: No space left on device"),
        (TimeoutError(), "monitor-error", "the machine's monitor failed"),
        (KeyError("k"), "monitor-error", "KeyError('k')"),
    ],
)
def test_failure_is_explained(error: Exception, reason: str, brief: str, capsys: pytest.CaptureFixture[str]) -> None:
    end = explain_failure(error)
    assert end.reason == reason
    assert brief in end.brief
    assert ("Traceback" in capsys.readouterr().err or "KeyError" in brief) is (isinstance(error, KeyError))


def test_step_that_fails_while_it_is_given_up_prints_nothing() -> None:
    """As QMP does when QEMU exits and its socket ends at the same time."""
    printed: list[str] = []

    async def fail_late() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            raise MachineError("the socket ended") from None

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: printed.append(context["message"]))
        life = Life()
        asyncio.get_running_loop().call_soon(life.finish, FIRST)
        with pytest.raises(EndedError):
            await life.or_end(fail_late())
        gc.collect()

    asyncio.run(main())
    assert printed == []


def test_next_boot_has_an_end_of_its_own_and_lasting_tasks_go_on() -> None:
    async def main() -> None:
        life = Life()
        lasting, of_a_boot = life.spawn(never(), is_lasting=True), life.spawn(never())
        life.is_ready = True
        life.finish(FIRST)
        await life.cancel_boot()
        life.renew()
        assert (of_a_boot.cancelled(), lasting.done(), life.end.done(), life.is_ready) == (True, False, False, False)
        life.finish(SECOND)
        assert await life.end is SECOND
        await life.cancel_all()
        assert lasting.cancelled()

    asyncio.run(main())


def test_end_that_the_host_wants_between_two_boots_is_not_lost() -> None:
    async def main() -> None:
        life = Life()
        life.finish(FIRST)
        life.stop(SECOND)
        assert await life.end is FIRST
        life.renew()
        assert await life.end is SECOND

    asyncio.run(main())


def test_lasting_task_that_fails_between_two_boots_is_the_end_of_the_machine() -> None:
    async def main() -> End:
        life = Life()
        life.finish(FIRST)
        life.spawn(fail(OSError(24, "Too many open files")), is_lasting=True)
        for _ in range(5):
            await asyncio.sleep(0)
        life.renew()
        return await life.end

    assert asyncio.run(main()).brief == "the machine's monitor failed: Too many open files"
