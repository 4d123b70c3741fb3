"""From a spec to a ready machine: choose, reserve, hand over to a monitor, listen to its reports. Blocking; async
stays in the monitor.

Whatever interrupts a start (an error, SIGINT, the death of this process) undoes it: the monitor sees its report
socket close and cleans up.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmkit.errors import MachineError
from vmkit.image.build import BuiltImage, build_image
from vmkit.image.recipe.config import load_image
from vmkit.machine import probe
from vmkit.machine.handover import MonitorHandle, start_monitor
from vmkit.machine.hardware import USER_READY_PORT, Hardware
from vmkit.machine.kernel import check_kernel
from vmkit.machine.launch import MAX_REPORT_LINE_BYTES, LaunchPlan, Report, Stage, parse_report
from vmkit.machine.memory import check_guest_memory
from vmkit.machine.parts.table import PARTS
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.registry import (
    MACHINES,
    Reservation,
    check_path_length,
    find_state_directory,
    open_runtime_directory,
    reserve,
)
from vmkit.machine.spec import MAX_NAME_CHARACTERS, Accelerator, Backend, MachineSpec
from vmkit.machine.token import DEMANDED, find_token_path, make_token, needs_token
from vmkit.machine.vhost import KernelVhostDoor, VhostClaim, VhostDoor

# The monitor itself keeps the deadline of the start; this is for a monitor that hangs.
MONITOR_GRACE_S = 30.0

Tell = Callable[[str, float | None], None]
Build = Callable[[str, Tell], BuiltImage]


@dataclass(frozen=True, slots=True)
class Choices:
    """What was chosen for a machine, and why where it is the slower way."""

    built: BuiltImage
    qemu: probe.Qemu
    kernel: Path
    accelerator: Accelerator
    accelerator_reason: str
    backend: Backend
    backend_reason: str
    root: Path | None = None
    nested: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A machine that said READY."""

    name: str
    cid: int
    choices: Choices
    seconds: float
    directory: Path
    monitor: "subprocess.Popen[bytes]"
    # What gdb's `target remote` takes.
    gdb: str | None = None


def start_machine(
    spec: MachineSpec,
    *,
    tell: Tell | None = None,
    on_directory: Callable[[Path], None] | None = None,
    door: VhostDoor | None = None,
    build: Build | None = None,
    monitor: MonitorHandle | None = None,
    is_owned: bool = False,
) -> Started:
    """Builds if needed, starts, waits until ready. on_directory is told where the console log will grow.

    is_owned: the machine ends when this process does, however that ends.

    door and build stand for the kernel's vhost-vsock and the image room; monitor is one that was started already, whose
    block the caller is in. Raises VshError kinds; nothing is left behind when it does.
    """
    say = tell or (lambda _text, _fraction: None)
    started_s = time.monotonic()
    vhost_door = door or KernelVhostDoor()
    with contextlib.ExitStack() as stack:
        monitor = monitor or stack.enter_context(start_monitor())
        choices = choose(spec, say, vhost_door, build or build_named_image)
        # Whoever wants to end this machine must find its monitor from the first moment on.
        record = {**plan_record(spec, choices), "pid": monitor.process.pid}
        say("starting QEMU", None)
        # On `vhost` the kernel knows which CIDs are free on the whole host, so it is asked, too.
        claim = VhostClaim(vhost_door)
        stack.callback(claim.close)
        asks = {"claim": claim.take} if choices.backend is Backend.VHOST else {}
        reservation = stack.enter_context(reserve(spec.name, spec.cid, choices.built.name, record, **asks))
        if on_directory is not None:
            on_directory(reservation.directory)
        if needs_token(choices.backend, asked=spec.token):
            make_token(reservation.directory)
        plan = plan_launch(spec, choices, reservation, record, is_owned=is_owned)
        # Should this be interrupted, the monitor must be gone before the reservation is: it holds the lock as well.
        with monitor.ended_on_error():
            monitor.launch(plan, reservation.lock_fd, claim.fd)
            _await_ready(plan, monitor, say)
    seconds = time.monotonic() - started_s
    return Started(
        reservation.name,
        reservation.cid,
        choices,
        seconds,
        reservation.directory,
        monitor.process,
        None if plan.record["gdb"] is None else str(plan.record["gdb"]),
    )


def build_named_image(image: str, tell: Tell) -> BuiltImage:
    """The image of a shipped name or of a recipe's path, from the cache or built now."""
    return build_image(load_image(image), progress=tell)


def choose(
    spec: MachineSpec, tell: Tell, door: VhostDoor, build: Build = build_named_image, *, prove: bool = True
) -> Choices:
    """The image, QEMU, accelerator and backend a spec leads to on this host.

    prove: whether KVM may be proven by booting a kernel under it, where that has not been done yet.
    """
    if spec.kernel is not None:
        check_kernel(spec.kernel)
    for part in PARTS:
        part.check_host(spec)
    runtime = open_runtime_directory()
    # What cannot work is refused before anything that takes its time: a build, the proof of KVM.
    check_path_length(runtime / MACHINES / (spec.name or Path(spec.image).stem[:MAX_NAME_CHARACTERS]))
    probe.check_open_files()
    qemu = probe.find_qemu(runtime)
    backend, backend_reason = probe.choose_backend(spec.backend, probe.probe_vhost(door))
    probe.check_memory(spec.memory_mib)
    built = build(spec.image, tell)
    for part in PARTS:
        part.check_image(spec, built)
    kernel = spec.kernel or built.kernel
    check_guest_memory(spec.memory_mib, kernel, built.initrd)
    kvm = None
    if spec.accelerator is None:
        kvm = probe.probe_kvm(qemu, built.kernel, runtime, prove=prove)
    accelerator, accelerator_reason = probe.choose_accelerator(spec.accelerator, kvm)
    return Choices(
        built,
        qemu,
        kernel,
        accelerator,
        accelerator_reason,
        backend,
        backend_reason,
        root=spec.root or built.root,
        nested=probe.is_emulated(),
    )


def plan_hardware(spec: MachineSpec, choices: Choices, name: str, cid: int, directory: Path) -> Hardware:
    """Everything that decides QEMU's argv. directory: the machine's."""
    return Hardware(
        spec=spec,
        name=name,
        cid=cid,
        directory=directory,
        accelerator=choices.accelerator,
        backend=choices.backend,
        qemu=choices.qemu.path,
        kernel=choices.kernel,
        initrd=choices.built.initrd,
        kernel_args=choices.built.kernel_args,
        ready_port=USER_READY_PORT if choices.backend is Backend.USER else None,
        token=find_token_path(directory) if needs_token(choices.backend, asked=spec.token) else None,
        root=choices.root,
        nested=choices.nested,
    )


def plan_record(spec: MachineSpec, choices: Choices) -> dict[str, object]:
    """What machine.json says beyond name, cid and state."""
    return {
        "image": choices.built.name,
        "digest": choices.built.digest,
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
    spec: MachineSpec, choices: Choices, reservation: Reservation, record: dict[str, object], *, is_owned: bool = False
) -> LaunchPlan:
    """What the monitor is told."""
    hardware = plan_hardware(spec, choices, reservation.name, reservation.cid, reservation.directory)
    return LaunchPlan(
        directory=reservation.directory,
        evidence=find_state_directory() / reservation.name,
        name=reservation.name,
        cid=reservation.cid,
        timeout_s=spec.timeout_s,
        qemu=plan_qemu(hardware),
        record={
            **record,
            "name": reservation.name,
            "cid": reservation.cid,
            **_merge(part.plan_addresses(hardware) for part in PARTS),
        },
        is_owned=is_owned,
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
                    tell("booting", None)
                case Stage.STARTED:
                    tell("plugging the vsock device", None)
    raise MachineError("the monitor of the machine ended without a report", details=monitor.read_log(plan))


def _read_report(stream: BinaryIO, plan: LaunchPlan) -> Report | None:
    try:
        line = stream.readline(MAX_REPORT_LINE_BYTES)
    except TimeoutError as error:
        raise MachineError(f"the monitor of '{plan.name}' does not answer any more", hint="is it stopped?") from error
    except OSError:
        # It was killed before it had read all that we sent.
        return None
    return parse_report(line) if line.endswith(b"\n") else None


def _explain_failure(plan: LaunchPlan, report: Report) -> MachineError:
    hint = report.hint or f"the logs are kept: vmkit logs {plan.name}"
    return MachineError(f"'{plan.name}' did not start: {report.brief}", details=report.details, hint=hint)
