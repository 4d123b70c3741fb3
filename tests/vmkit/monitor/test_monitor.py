"""A monitor in this process, with a QEMU that plays scenarios: the vhost backend end to end but for its device, and
what a start from outside cannot show.
"""

import asyncio
import errno
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.vmkit.memory.kernel_maker import BANNER_TEXT, KernelMaker
from tests.vmkit.monitor.test_ready import VsockLike
from vmkit.errors import MachineError
from vmkit.image.build import BuiltImage
from vmkit.machine import probe
from vmkit.machine.choose import Choices, choose
from vmkit.machine.launch import LaunchPlan, Layout, Report, Stage, parse_report
from vmkit.machine.parts.part import Companion, Fitting
from vmkit.machine.registry import find_state_directory, reserve
from vmkit.machine.spec import Accelerator, Backend, MachineSpec
from vmkit.machine.start import plan_launch, plan_record, start_machine
from vmkit.machine.vhost import VhostClaim, VhostDoor
from vmkit.machine.words import Quit
from vmkit.monitor.fittings import Fittings
from vmkit.monitor.monitor import Monitor
from vmkit.monitor.ready import ReadyListener, open_ready_listener
from vsh.registry import Entry, find_machine, read_machines

DEADLINE_S = 30.0
READY_PORT = 40123


class Door:
    """/dev/vhost-vsock of a host where some CIDs are taken."""

    def __init__(self, taken: tuple[int, ...] = ()) -> None:
        self.taken = taken
        self.claimed: list[int] = []

    def open_device(self) -> int:
        return os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)

    def set_guest_cid(self, fd: int, cid: int) -> None:
        if cid in self.taken:
            raise OSError(errno.EADDRINUSE, "taken")
        self.claimed.append(cid)


@dataclass
class Seen:
    """What a life was like: its exit status, its reports, and its record when READY was told."""

    status: int = -1
    reports: list[Report] = field(default_factory=list)
    entry: Entry | None = None
    events: list[dict[str, object]] = field(default_factory=list)
    qmp: str = ""
    argv: str = ""

    @property
    def stages(self) -> list[Stage]:
        return [report.stage for report in self.reports]


def open_fake_vsock(peers: list[object]) -> Callable[[LaunchPlan], ReadyListener]:
    """A ready listener whose callers come from the given vsock addresses; the fake QEMU finds it by its path."""

    def open_listener(plan: LaunchPlan) -> ReadyListener:
        sock = VsockLike(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.peers = list(peers)
        sock.bind(str(plan.directory / "vsock.sock_7777"))
        sock.listen()
        return ReadyListener(sock, READY_PORT, plan.cid)

    return open_listener


def live(
    plan: LaunchPlan,
    vhost_fd: int | None,
    open_ready: Callable[[LaunchPlan], ReadyListener],
    at_ready: Callable[[Monitor], None] | None = None,
    door: VhostDoor | None = None,
) -> Seen:
    """One life of a monitor; at READY it is looked at, and ended unless at_ready says otherwise."""
    ours, theirs = socket.socketpair()
    seen = Seen()

    async def listen_to_reports(monitor: Monitor) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        while line := await reader.readline():
            seen.reports.append(parse_report(line))
            if seen.reports[-1].stage is Stage.READY:
                seen.entry = find_machine(name=plan.name)
                seen.qmp = (plan.directory / Layout.QMP_LOG).read_text()
                seen.argv = (plan.directory / Layout.ARGV).read_text()
                if at_ready is None:
                    await monitor._on_control(Quit())
                else:
                    at_ready(monitor)
        writer.close()

    async def main() -> None:
        theirs.setblocking(False)
        monitor = Monitor(plan, theirs, vhost_fd, open_ready, door=door)
        async with asyncio.timeout(DEADLINE_S):
            listening = asyncio.create_task(listen_to_reports(monitor))
            seen.status = await monitor.run()
            theirs.close()
            await listening

    asyncio.run(main())
    return seen


@pytest.fixture
def vhost(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """vhost(scenario, peers) starts a machine of the vhost backend through a fake door, and ends it at READY."""

    def run(scenario: str, peers: list[object], door: Door | None = None, **fields: Any) -> Seen:
        spec = MachineSpec(append=f"fake={scenario}", accelerator=Accelerator.TCG, **fields)
        a_door = door or Door()
        with monkeypatch.context() as patch:
            # Nothing is opened but the fake door: the word keeps vmkit from trying, and there is nothing to try.
            patch.delenv("VSH_AF_VSOCK")
            choices = choose(spec, lambda _text, _fraction: None, a_door, lambda _image, _tell: image)
        assert choices.backend is Backend.VHOST
        claim = VhostClaim(a_door)
        record = plan_record(spec, choices)
        with reserve(spec.name, spec.cid, "tiny", record, claim.take) as reservation:
            plan = plan_launch(spec, choices, reservation, record)
            return live(plan, claim.fd, open_fake_vsock(peers))

    return run


def test_vhost_start_is_whole_but_for_the_device(vhost: Callable[..., Seen]) -> None:
    door = Door(taken=(3, 4))
    seen = vhost("ready", [(5, 1023)], door)
    assert seen.stages == [Stage.STARTED, Stage.RUNNING, Stage.READY]
    assert seen.status == 0
    assert door.claimed == [5]
    assert "-smbios" in seen.argv
    assert "vmkit.token=smbios" in seen.argv
    assert seen.entry is not None
    assert (seen.entry.cid, seen.entry.backend, seen.entry.vsock, seen.entry.state) == (5, "vhost", None, "ready")
    # The port that only the monitor knew, in the guest's kernel command line; no device process.
    assert f"vmkit.ready={READY_PORT}" in seen.argv
    text = seen.qmp.replace("\n", " ")
    assert '"execute": "getfd"' in text
    assert '"vhost-vsock-pci"' in text
    assert '"guest-cid": 5' in text
    assert read_machines() == []


def test_ready_on_vhost_counts_from_the_guests_root_only(vhost: Callable[..., Seen]) -> None:
    """A user of it does not make it ready; test_ready.py has every other stranger."""
    seen = vhost("ready", [(3, 1024)], timeout_s=1.0)
    assert seen.stages == [Stage.STARTED, Stage.RUNNING, Stage.FAILED]
    assert seen.reports[-1].brief == "the guest was not ready within 1 s"


def test_taken_cid_on_vhost_is_a_clear_error(vhost: Callable[..., Seen]) -> None:
    with pytest.raises(MachineError, match="CID 77 is in use on this host"):
        vhost("ready", [], Door(taken=(77,)), cid=77)
    assert read_machines() == []


def test_vhost_without_vsock_sockets_is_told_by_up(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of `up`, with a real monitor, to the point where the host's own vsock is needed, and is denied."""
    monkeypatch.setattr(probe, "probe_vhost", lambda _door: probe.Verdict(True, "a fake door"))
    spec = MachineSpec(accelerator=Accelerator.TCG, backend=Backend.VHOST, append="fake=ready")
    with pytest.raises(MachineError) as caught:
        start_machine(spec, door=Door(), build=lambda _image, _tell: image)
    assert caught.value.brief == "'tiny' did not start: cannot listen on vsock: AF_VSOCK is denied by VSH_AF_VSOCK=deny"
    assert read_machines() == []


def user_plan(image: BuiltImage, scenario: str) -> tuple[MachineSpec, Choices]:
    spec = MachineSpec(append=f"fake={scenario}", accelerator=Accelerator.TCG, backend=Backend.USER)
    return spec, choose(spec, lambda _text, _fraction: None, Door(), lambda _image, _tell: image)


def run_user(image: BuiltImage, scenario: str, before: Callable[[LaunchPlan], None], **options: Any) -> Seen:
    spec, choices = user_plan(image, scenario)
    with reserve("m", None, "tiny", {}) as reservation:
        plan = plan_launch(spec, choices, reservation, {"backend": "user"})
        before(plan)
        return live(plan, None, **{"open_ready": open_ready_listener, **options})


def test_failure_nobody_foresaw_is_told_and_cleans_up(image: BuiltImage, capfd: pytest.CaptureFixture[str]) -> None:
    def break_down(_plan: LaunchPlan) -> ReadyListener:
        raise ZeroDivisionError("unforeseen")

    seen = run_user(image, "ready", lambda _plan: None, open_ready=break_down)
    assert seen.stages == [Stage.FAILED]
    assert "ZeroDivisionError('unforeseen')" in seen.reports[0].brief
    assert seen.status == 1
    assert "Traceback" in capfd.readouterr().err
    assert read_machines() == []


@pytest.mark.parametrize("name", [Layout.CONTROL, Layout.VSOCK, Layout.CONSOLE_LOG, Layout.QEMU_LOG])
def test_part_that_cannot_be_made_is_named(image: BuiltImage, name: str) -> None:
    def block(plan: LaunchPlan) -> None:
        (plan.directory / name).mkdir()

    seen = run_user(image, "ready", block)
    assert seen.stages[-1] is Stage.FAILED
    assert seen.reports[-1].brief.startswith("the machine's monitor failed: ")
    assert read_machines() == []


def test_missing_qemu_is_told_with_its_package(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(plan: LaunchPlan) -> None:
        object.__setattr__(plan.qemu, "argv", ("/nonexistent/qemu", *plan.qemu.argv[1:]))

    seen = run_user(image, "ready", remove)
    assert seen.reports[-1].brief == "cannot start '/nonexistent/qemu': No such file or directory"
    assert "apt-get install qemu-system-x86" in seen.reports[-1].hint


def test_end_of_a_ready_machine_goes_to_those_who_wait_and_to_the_evidence(image: BuiltImage) -> None:
    seen = run_user(image, "ready-then-die", lambda _plan: None, at_ready=lambda _monitor: None)
    assert seen.stages == [Stage.STARTED, Stage.RUNNING, Stage.READY]
    assert seen.status == 1
    events = (find_state_directory() / "m" / Layout.EVENTS).read_text().splitlines()
    assert json.loads(events[-1])["brief"] == "QEMU ended with signal 9 (SIGKILL)"


def test_device_that_keeps_dying_ends_the_machine(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmkit.monitor.companion.QEMU_END_DEADLINE_S", 0.01)

    async def replugged(_self: Fittings, _plan: Fitting, _companion: Companion, _connection: socket.socket) -> None:
        """The fake QEMU cannot unplug."""

    monkeypatch.setattr(Fittings, "replug", replugged)

    def kill_each(monitor: Monitor) -> None:
        async def kill() -> None:
            last = 0
            while not monitor._life.end.done():
                child = monitor._fittings.companions["vsock"]._child
                if child is not None and child.pid != last:
                    last = child.pid
                    os.kill(last, 9)
                await asyncio.sleep(0.005)

        monitor._life.spawn(kill())

    seen = run_user(image, "ready", lambda _plan: None, at_ready=kill_each)
    assert seen.status == 1
    events = [json.loads(line) for line in (find_state_directory() / "m" / Layout.EVENTS).read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.count("device-started") == 4
    assert names.count("device-replaced") == 3
    assert events[-1]["brief"] == "the vsock device ended with signal 9 (SIGKILL) after 3 restarts within 60 s"


def test_device_that_cannot_be_replaced_ends_the_machine(image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake QEMU cannot unplug; the real one is in tests/guest."""
    monkeypatch.setattr("vmkit.monitor.companion.QEMU_END_DEADLINE_S", 0.01)

    def kill(monitor: Monitor) -> None:
        child = monitor._fittings.companions["vsock"]._child
        assert child is not None
        os.kill(child.pid, 9)

    seen = run_user(image, "ready", lambda _plan: None, at_ready=kill)
    assert seen.status == 1
    last = json.loads((find_state_directory() / "m" / Layout.EVENTS).read_text().splitlines()[-1])
    assert last["brief"] == "the vsock device ended and could not be replaced"


def test_descriptor_that_was_promised_and_not_given_is_told(image: BuiltImage) -> None:
    spec, choices = user_plan(image, "ready")
    with reserve("m", None, "tiny", {}) as reservation:
        plan = plan_launch(spec, choices, reservation, {})
        fitting = next(one for one in plan.qemu.fittings if one.companion is not None)
        object.__setattr__(plan.qemu, "fittings", (replace(fitting, companion=None),))
        seen = live(plan, None, open_fake_vsock([]))
    assert "and vmkit up gave none" in seen.reports[-1].brief


def test_logs_of_a_life_are_where_they_are_looked_for(
    image: BuiltImage, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KernelMaker()
    kernel.log(BANNER_TEXT)
    (tmp_path / "memory").write_bytes(kernel.memory)
    monkeypatch.setenv("FAKE_MEMORY", str(tmp_path / "memory"))
    seen = run_user(image, "panic", lambda _plan: None)
    assert seen.stages[-1] is Stage.FAILED
    assert "kernel panicked" in seen.reports[-1].brief
    kept = set(os.listdir(find_state_directory() / "m"))
    assert kept >= set(Layout.LOGS) - {Layout.MONITOR_LOG, Layout.SYSLOG}
