"""How the machine of a command ends: one that may have written to a disk powers off first, however the run ends."""

from collections.abc import Callable
from functools import partial

import pytest

from vmkit.errors import MachineError
from vmkit.machine import stop
from vmkit.oneshot.execute import BROKEN_OFF_POWER_OFF_S, end_with_block
from vsh.registry import Entry

End = Callable[[Entry], None]
Way = tuple[object, dict[str, object]]


class Stopped(BaseException):
    """As SIGINT and SIGTERM are told."""


def describe(way: End) -> Way:
    return (way.func, way.keywords) if isinstance(way, partial) else (way, {})


KILL: Way = (stop.kill, {})
POWER_OFF: Way = (stop.power_off, {})
POWER_OFF_SOON: Way = (stop.power_off, {"timeout_s": BROKEN_OFF_POWER_OFF_S})


def test_machine_that_may_have_written_powers_off_however_the_run_ends() -> None:
    ways: list[Way] = []

    def end(way: End) -> None:
        ways.append(describe(way))

    with end_with_block(end, writes=True):
        pass
    assert ways == [POWER_OFF, KILL]
    ways.clear()
    for error in (Stopped(), MachineError("the reader has gone")):
        with pytest.raises(type(error)), end_with_block(end, writes=True):
            raise error
    assert ways == [POWER_OFF_SOON, KILL] * 2
    ways.clear()
    with pytest.raises(Stopped), end_with_block(end, writes=False):
        raise Stopped
    assert ways == [KILL]


def test_guest_that_does_not_power_off_hides_no_error() -> None:
    ways: list[object] = []

    def end(way: End) -> None:
        ways.append(way)
        if way is not stop.kill:
            raise MachineError("it does not end")

    with pytest.raises(MachineError, match="the first reason"), end_with_block(end, writes=True):
        raise MachineError("the first reason")
    assert ways[-1] is stop.kill
