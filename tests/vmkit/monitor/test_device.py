"""How the monitor runs the device process: how often it is replaced, and with which words it is started."""

import socket
from pathlib import Path

import pytest

from vmkit.monitor.device import Restarts, VsockDevice
from vmkit.monitor.logs import CappedLog


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


@pytest.mark.parametrize(("value", "is_off"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_sandbox_is_off_where_the_environment_asks_for_it(
    value: str | None, is_off: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VMKIT_NO_SANDBOX", raising=False)
    if value is not None:
        monkeypatch.setenv("VMKIT_NO_SANDBOX", value)
    log = CappedLog(tmp_path / "log")
    with socket.socket(socket.AF_UNIX) as listener:
        argv = VsockDevice(tmp_path, 3, listener, log)._render_argv(4, 5)
    log.close()
    assert ("--no-sandbox" in argv) == is_off
