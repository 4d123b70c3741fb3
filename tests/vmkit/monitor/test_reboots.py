"""A guest that reboots: its machine goes on, those who look learn it, and a loop of resets has an end."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmkit.monitor.test_monitor import Door, Seen, live, open_fake_vsock
from tests.vsh.live import wait_until
from vmkit.image.build import BuiltImage
from vmkit.machine import probe, stop
from vmkit.machine.choose import choose
from vmkit.machine.launch import LaunchPlan, Layout, Stage
from vmkit.machine.registry import find_state_directory, reserve
from vmkit.machine.spec import Accelerator, Backend, MachineSpec, OnReset
from vmkit.machine.start import Started, plan_launch, plan_record
from vmkit.machine.vhost import VhostClaim
from vmkit.machine.words import Watch
from vmkit.monitor import reboots as reboots_module
from vmkit.monitor.end import End
from vmkit.monitor.ready import ReadyListener, open_ready_listener
from vmkit.monitor.reboots import MAX_SHORT_BOOTS, SHORT_BOOT_S, Reboots
from vsh.ending import explain_loss
from vsh.errors import ConnectionLost
from vsh.registry import Entry, find_machine, read_machines

Boot = Callable[..., Started]
RESET = End("reset", "the guest asked for a reset", expected=True)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def find(name: str) -> Entry:
    entry = find_machine(name=name)
    assert entry is not None
    return entry


def reset_guest(entry: Entry) -> None:
    os.kill(int(str(entry.record["qemu_pid"])), signal.SIGUSR1)


def await_reboot(name: str, count: int) -> Entry:
    def has_rebooted() -> bool:
        now = find(name)
        return now.record["reboots"] == count and now.state == "ready"

    wait_until(has_rebooted, f"reboot {count} is over")
    return find(name)


def read_events(log: Path) -> list[str]:
    """The names of those that are of interest here. A line may be on its way."""
    lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [name for name in (json.loads(line)["event"] for line in lines) if name in ("ready", "reboot")]


def test_reset_is_the_end_unless_a_reboot_is_wanted_and_nobody_has_asked_for_the_end() -> None:
    assert Reboots(is_wanted=False).take(RESET, is_asked=False) is RESET
    wanted = Reboots(is_wanted=True)
    panic = End("panic", "the guest's kernel panicked")
    assert wanted.take(panic, is_asked=False) is panic
    assert wanted.take(RESET, is_asked=True) is RESET
    assert wanted.count == 0
    assert wanted.take(RESET, is_asked=False) is None
    assert wanted.count == 1


def test_only_short_boots_in_a_row_are_a_loop() -> None:
    clock = Clock()
    reboots = Reboots(is_wanted=True, clock=clock)
    for _ in range(3):
        for _ in range(MAX_SHORT_BOOTS):
            reboots.note_ready()
            clock.now_s += SHORT_BOOT_S / 2
            assert reboots.take(RESET, is_asked=False) is None
        reboots.note_ready()
        clock.now_s += SHORT_BOOT_S
        assert reboots.take(RESET, is_asked=False) is None
    # Never ready.
    for _ in range(MAX_SHORT_BOOTS):
        assert reboots.take(RESET, is_asked=False) is None
    end = reboots.take(RESET, is_asked=False)
    assert end is not None
    assert (end.reason, end.expected) == ("reset-loop", False)
    assert "11 boots in a row" in end.brief


def test_machine_goes_on_after_a_reboot_and_those_who_look_learn_it(boot: Boot) -> None:
    started = boot("reset-when-told", on_reset=OnReset.RESTART)
    first = find(started.name)
    assert first.record["reboots"] == 0
    told: list[str] = []
    with stop.open_control(first, lambda: told.append("reboot")) as control:
        control.ask(Watch())
        reset_guest(first)
        # What a session of vsh does that has lost its connection: it waits for the reason.
        lost = ConnectionLost("the connection ended")
        explain_loss(lost, first)
        assert lost.brief == f"lost the connection to machine '{started.name}': the guest reboots"
        again = await_reboot(started.name, 1)
        assert (again.pid, again.cid, again.directory) == (first.pid, first.cid, first.directory)
        assert again.record["qemu_pid"] != first.record["qemu_pid"]
        reset_guest(again)
        await_reboot(started.name, 2)
        log = Path(first.directory) / Layout.EVENTS
        # The record comes first.
        wait_until(lambda: read_events(log) == ["ready", "reboot", "ready", "reboot", "ready"], "all is in the log")
        stop.kill(find(started.name))
        ended = control.wait_end(10)
    assert ended is not None
    assert ended.expected
    assert told == ["reboot", "reboot"]
    assert read_machines() == []


def test_reset_without_the_option_still_ends_the_machine(boot: Boot) -> None:
    started = boot("reset-when-told")
    entry = find(started.name)
    assert "reboots" not in entry.record
    with stop.open_control(entry) as control:
        control.ask(Watch())
        reset_guest(entry)
        ended = control.wait_end(10)
    assert ended is not None
    assert ended.reason == "reset"


def test_panic_is_no_reboot(boot: Boot) -> None:
    started = boot("ready-then-panic", on_reset=OnReset.RESTART)
    started.monitor.wait(30)
    last = json.loads((find_state_directory() / started.name / Layout.EVENTS).read_text().splitlines()[-1])
    assert last["reason"] == "panic"


def play(
    image: BuiltImage, scenario: str, backend: Backend, open_ready: Callable[[LaunchPlan], ReadyListener], door: Door
) -> Seen:
    """One life of a monitor in this process. The guest is reset at its first READY, and the machine ends later."""
    spec = MachineSpec(
        append=f"fake={scenario}", accelerator=Accelerator.TCG, backend=backend, on_reset=OnReset.RESTART
    )
    choices = choose(spec, lambda _text, _fraction: None, door, lambda _image, _tell: image)
    claim = VhostClaim(door)
    take = claim.take if backend is Backend.VHOST else (lambda _cid: None)
    with reserve("m", None, "tiny", plan_record(spec, choices), take) as reservation:
        plan = plan_launch(spec, choices, reservation, plan_record(spec, choices))
        return live(plan, claim.fd, open_ready, at_ready=lambda _monitor: reset_guest(find("m")), door=door)


def test_guest_that_resets_itself_before_it_is_ready_fails_the_start(
    image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reboots_module, "MAX_SHORT_BOOTS", 2)
    seen = play(image, "reset-at-once", Backend.USER, open_ready_listener, Door())
    assert seen.stages[-1] is Stage.FAILED
    assert "3 boots in a row ended with a reset" in seen.reports[-1].brief
    assert "--on-reset" in seen.reports[-1].hint
    assert seen.status == 1
    assert read_machines() == []


def test_cid_on_vhost_is_claimed_again_for_each_boot(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second claim fails here, which is told like any other cause, and leaves nothing."""
    monkeypatch.setattr(probe, "probe_vhost", lambda _door: probe.Verdict(True, "a fake door"))
    door = Door()
    claim = door.set_guest_cid

    def claim_once(fd: int, cid: int) -> None:
        door.taken = (cid,) if door.claimed else ()
        claim(fd, cid)

    monkeypatch.setattr(door, "set_guest_cid", claim_once)
    seen = play(image, "reset-when-told", Backend.VHOST, open_fake_vsock([(3, 1023)]), door)
    assert seen.status == 1
    assert door.claimed == [3]
    last = json.loads((find_state_directory() / "m" / Layout.EVENTS).read_text().splitlines()[-1])
    assert (last["reason"], last["brief"]) == ("start-failed", "CID 3 is in use on this host")
    assert read_machines() == []
