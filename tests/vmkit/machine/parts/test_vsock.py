"""With which words the process of our vsock device is started."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.vmkit.machine.test_qemu import HARDWARE
from vmkit.machine.parts.vsock import plan_companion


@pytest.mark.parametrize(("value", "is_off"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_sandbox_is_off_where_the_environment_asks_for_it(
    value: str | None, is_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VMKIT_NO_SANDBOX", raising=False)
    if value is not None:
        monkeypatch.setenv("VMKIT_NO_SANDBOX", value)
    argv = plan_companion(replace(HARDWARE, directory=Path("/run/m"))).argv
    assert "/run/m/vsock.sock" in argv
    assert ("--no-sandbox" in argv) == is_off
