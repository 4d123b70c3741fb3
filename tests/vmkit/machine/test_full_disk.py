"""A guest whose disk takes no data is paused, says why, and goes on when it is told to."""

import os
import signal
import time

from tests.vmkit.machine.conftest import Boot
from vmkit.machine.pause import resume
from vsh.registry import Entry, find_machine

DEADLINE_S = 30


def await_state(name: str, state: str) -> Entry:
    """The registry is files, and announces nothing."""
    end_s = time.monotonic() + DEADLINE_S
    while True:
        entry = find_machine(name=name)
        assert entry is not None
        if entry.state == state:
            return entry
        assert time.monotonic() < end_s, entry.record
        time.sleep(0.02)


def test_guest_waits_for_room_and_goes_on(boot: Boot) -> None:
    name = boot("ready-then-full-disk").name
    entry = await_state(name, "ready")
    assert "trouble" not in entry.record
    os.kill(int(str(entry.record["qemu_pid"])), signal.SIGUSR1)
    entry = await_state(name, "paused")
    assert entry.record["trouble"] == "this host cannot write what the guest writes: No space left on device"
    resume(entry)
    entry = await_state(name, "ready")
    assert "trouble" not in entry.record
