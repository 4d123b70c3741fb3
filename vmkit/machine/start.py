"""From a spec to a ready machine: choose, reserve, hand over to a monitor, listen to its reports. Blocking; async
stays in the monitor.

Whatever interrupts a start (an error, SIGINT, the death of this process) undoes it: the monitor sees its report
socket close and cleans up.
"""

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from vmkit.architectures import find_architecture
from vmkit.crashes.place import find_usable_folder
from vmkit.errors import MachineError
from vmkit.machine.choose import Build, Choices, Tell, choose, plan_hardware
from vmkit.machine.handover import MonitorHandle, start_monitor
from vmkit.machine.launch import MAX_REPORT_LINE_BYTES, CrashPlan, LaunchPlan, Report, SnapshotPlan, Stage, parse_report
from vmkit.machine.parts.seed import make_seed
from vmkit.machine.parts.table import PARTS, list_companion_logs
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.registry import Reservation, check_free, find_state_directory, reserve
from vmkit.machine.restore import SnapshotSource, drop_source, find_source, take_options
from vmkit.machine.source import name_machine, take_source
from vmkit.machine.spec import Backend, MachineSpec, OnReset
from vmkit.machine.stored import hold_stored
from vmkit.machine.token import DEMANDED, append_token, find_token_path, make_token, needs_token
from vmkit.machine.vhost import KernelVhostDoor, VhostClaim, VhostDoor

log = logging.getLogger("vmkit")

# What a start tells each time, with everything built.
STARTING, PLUGGING, BOOTING, THAWING = "starting QEMU", "plugging the vsock device", "booting", "thawing"
STAGES = frozenset((STARTING, PLUGGING, BOOTING, THAWING))

# The monitor itself keeps the deadline of the start; this is for a monitor that hangs.
MONITOR_GRACE_S = 30.0


# A restore takes a second on a quiet host. One that takes this long, or this share of --timeout where that is longer,
# has failed. The machine boots then.
RESTORE_DEADLINE_S = 30.0
RESTORE_SHARE = 1 / 4
# Of data: the pages that the guest has not touched cost nothing.
MAX_DUMP_BYTES = 4 << 30


class RestoreError(MachineError):
    """A machine did not start from its snapshot; a boot may help."""


@dataclass(frozen=True, slots=True)
class Started:
    """A machine that sent READY. started_by: `boot`, or `snapshot`."""

    name: str
    cid: int
    choices: Choices
    seconds: float
    directory: Path
    monitor: "subprocess.Popen[bytes]"
    # What gdb's `target remote` takes.
    gdb: str | None = None
    started_by: str = "boot"
    # Of the snapshot it was started from.
    snapshot: str | None = None


def start_machine(
    spec: MachineSpec,
    *,
    tell: Tell | None = None,
    on_directory: Callable[[Path], None] | None = None,
    on_choices: Callable[[Choices], None] | None = None,
    door: VhostDoor | None = None,
    build: Build | None = None,
    monitor: MonitorHandle | None = None,
    is_owned: bool = False,
) -> Started:
    """Builds if needed, starts, waits until ready. Calls on_choices with what this host leads to, and on_directory with
    the console log's directory.

    A machine that has a snapshot starts from it, and by a boot where that fails.

    is_owned: the machine ends when this process does, however that ends.

    door and build stand for the kernel's vhost-vsock and the image room; monitor is one that was started already, whose
    block the caller is in. Raises VshError kinds; nothing is left behind when it does.
    """
    say = tell or (lambda _text, _fraction: None)
    started_s = time.monotonic()
    vhost_door = door or KernelVhostDoor()
    # Before a build, which may take minutes.
    check_free(spec.name, spec.cid)
    with contextlib.ExitStack() as stack:
        monitor = monitor or stack.enter_context(start_monitor())
        spec = take_source(take_options(spec), say)
        choices = choose(spec, say, vhost_door, build)
        if on_choices is not None:
            on_choices(choices)
        start = _Start(spec, choices, say, on_directory, vhost_door, started_s, is_owned=is_owned)
        source = find_source(spec, choices)
        if source is None:
            return start.run(monitor, None)
        try:
            return start.run(monitor, SnapshotPlan(source.folder, spec.memory_mib), source)
        except RestoreError as error:
            if source.is_named:
                raise
            drop_source(source)
            log.warning("%s; the machine boots instead", error.brief)
            return start.run(stack.enter_context(start_monitor()), None)


@dataclass(frozen=True, slots=True)
class _Start:
    """One machine to start, by a boot or from a snapshot."""

    spec: MachineSpec
    choices: Choices
    say: Tell
    on_directory: Callable[[Path], None] | None
    door: VhostDoor
    started_s: float
    is_owned: bool

    def run(
        self, monitor: MonitorHandle, snapshot: SnapshotPlan | None, source: SnapshotSource | None = None
    ) -> Started:
        """Reserves, launches, waits. Raises RestoreError where a source was given and is of no use."""
        spec, choices = self.spec, self.choices
        started_by = "boot" if source is None else "snapshot"
        # Another verb that ends this machine must find its monitor from the first moment on.
        record = {**plan_record(spec, choices), "pid": monitor.process.pid, "started_by": started_by}
        with contextlib.ExitStack() as stack:
            # On `vhost` the kernel knows which CIDs are free on the whole host, so the start asks it, too.
            claim = VhostClaim(self.door)
            stack.callback(claim.close)
            asks = {"claim": claim.take} if choices.backend is Backend.VHOST else {}
            reservation = stack.enter_context(
                reserve(spec.name, spec.cid, _find_base_name(spec, choices), record, **asks)
            )
            self.say(STARTING, None)
            if self.on_directory is not None:
                self.on_directory(reservation.directory)
            stored_fd = stack.enter_context(hold_stored(spec.stored)) if spec.stored is not None else None
            if needs_token(choices.backend, asked=spec.token):
                make_token(reservation.directory)
                if not find_architecture(spec.architecture).has_oem_strings:
                    append_token(reservation.directory, choices.initrd)
            make_seed(spec, reservation.name, reservation.directory)
            plan = plan_launch(spec, choices, reservation, record, is_owned=self.is_owned, snapshot=snapshot)
            # Should this be interrupted, the monitor must be gone before the reservation is: it holds the lock as well.
            with monitor.ended_on_error():
                monitor.launch(plan, reservation.lock_fd, claim.fd, stored_fd)
                _await_ready(plan, monitor, self.say)
        return Started(
            reservation.name,
            reservation.cid,
            choices,
            time.monotonic() - self.started_s,
            reservation.directory,
            monitor.process,
            None if plan.record["gdb"] is None else str(plan.record["gdb"]),
            started_by,
            None if source is None else source.name,
        )


def _find_base_name(spec: MachineSpec, choices: Choices) -> str:
    """What the machine is called when its user gave no name, and others have not taken it."""
    root = spec.source or spec.root or spec.root_from
    if choices.built.takes_root and root is not None:
        return name_machine(root)
    return choices.built.name


def _find_source(spec: MachineSpec, choices: Choices) -> str | None:
    """What the user gave as the root, where the image takes any; else None."""
    if not choices.built.takes_root or spec.root is None:
        return None
    return spec.source or str(spec.root)


def plan_record(spec: MachineSpec, choices: Choices) -> dict[str, object]:
    """Returns the fields of machine.json beyond name, cid and state."""
    return {
        "image": choices.built.name,
        "source": _find_source(spec, choices),
        "container": None if spec.container is None else asdict(spec.container),
        "digest": choices.built.digest,
        "architecture": spec.architecture,
        "backend": choices.backend.value,
        "accelerator": choices.accelerator.value,
        "memory_mib": spec.memory_mib,
        "cpus": spec.cpus,
        "user": choices.built.default_user,
        "started": round(time.time(), 3),
        "qemu_version": choices.qemu.render_version(),
        "token": DEMANDED if needs_token(choices.backend, asked=spec.token) else None,
        **_merge(part.plan_record(spec) for part in PARTS),
    }


def plan_launch(
    spec: MachineSpec,
    choices: Choices,
    reservation: Reservation,
    record: dict[str, object],
    *,
    is_owned: bool = False,
    snapshot: SnapshotPlan | None = None,
) -> LaunchPlan:
    """Returns the plan that the monitor gets."""
    timeout_s = spec.timeout_s
    if snapshot is not None:
        timeout_s = min(timeout_s, max(RESTORE_DEADLINE_S, timeout_s * RESTORE_SHARE))
        if needs_token(choices.backend, asked=spec.token):
            snapshot = replace(snapshot, token=str(find_token_path(reservation.directory)))
    place = (reservation.name, reservation.cid, reservation.directory)
    hardware = plan_hardware(spec, choices, *place, is_restored=snapshot is not None)
    return LaunchPlan(
        directory=reservation.directory,
        evidence=find_state_directory() / reservation.name,
        name=reservation.name,
        cid=reservation.cid,
        timeout_s=timeout_s,
        qemu=plan_qemu(hardware),
        record={
            **record,
            "name": reservation.name,
            "cid": reservation.cid,
            **_merge(part.plan_addresses(hardware) for part in PARTS),
        },
        companion_logs=tuple(list_companion_logs().values()),
        is_owned=is_owned,
        snapshot=snapshot,
        is_stored=spec.stored is not None,
        reboots=spec.on_reset is OnReset.RESTART,
        crashes=_plan_crashes(spec, choices),
    )


def _plan_crashes(spec: MachineSpec, choices: Choices) -> CrashPlan | None:
    folder = find_usable_folder()
    vmlinux = "" if choices.vmlinux is None else str(choices.vmlinux)
    root = spec.root or spec.root_from
    return (
        None
        if folder is None
        else CrashPlan(
            folder, MAX_DUMP_BYTES, spec.vmcore or "", vmlinux, spec.cores, "" if root is None else str(root)
        )
    )


def _merge(entries: Iterable[dict[str, object]]) -> dict[str, object]:
    return {key: value for entry in entries for key, value in entry.items()}


def _await_ready(plan: LaunchPlan, monitor: MonitorHandle, tell: Tell) -> None:
    reports = monitor.reports
    reports.settimeout(plan.timeout_s + MONITOR_GRACE_S)
    with reports.makefile("rb") as stream:
        while report := _read_report(stream, plan):
            match report.stage:
                case Stage.READY:
                    return
                case Stage.FAILED:
                    raise _explain_failure(plan, report)
                case Stage.RUNNING:
                    tell(BOOTING if plan.snapshot is None else THAWING, None)
                case Stage.STARTED:
                    tell(PLUGGING, None)
    raise MachineError("the monitor of the machine ended without a report", details=monitor.read_log(plan))


def _read_report(stream: BinaryIO, plan: LaunchPlan) -> Report | None:
    try:
        line = stream.readline(MAX_REPORT_LINE_BYTES)
    except TimeoutError as error:
        raise MachineError(
            f"the monitor of '{plan.name}' does not answer any more",
            hint="if a signal stopped it, let it go on: kill -CONT PID",
        ) from error
    except OSError:
        # It was killed before it had read all that we sent.
        return None
    return parse_report(line) if line.endswith(b"\n") else None


def _explain_failure(plan: LaunchPlan, report: Report) -> MachineError:
    # `vmkit kill` of a machine that starts is no reason to start it again.
    if plan.snapshot is not None and not report.is_expected:
        hint = report.hint or "vmkit up --boot starts it by a boot"
        brief = f"'{plan.name}' did not start from its snapshot: {report.brief}"
        return RestoreError(brief, details=report.details, hint=hint)
    hint = report.hint or f"the logs are kept: vmkit logs {plan.name}"
    return MachineError(f"'{plan.name}' did not start: {report.brief}", details=report.details, hint=hint)
