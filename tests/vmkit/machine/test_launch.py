"""Plans and reports survive their journey, and a report always fits into the line that is read for it."""

from dataclasses import replace
from pathlib import Path

import pytest

from vmkit.machine.hardware import Hardware
from vmkit.machine.launch import (
    MAX_DETAILS_CHARACTERS,
    MAX_PLAN_BYTES,
    MAX_REPORT_LINE_BYTES,
    LaunchPlan,
    Report,
    SnapshotPlan,
    Stage,
    parse_launch_plan,
    parse_report,
)
from vmkit.machine.parts.table import list_companion_logs
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.running import LOG_KINDS
from vmkit.machine.spec import Accelerator, Backend, DiskSpec, MachineSpec


@pytest.mark.parametrize("backend", list(Backend))
def test_plan_is_the_same_after_its_journey(backend: Backend) -> None:
    hardware = Hardware(
        spec=MachineSpec(cpus=2, append="d='e'", gdb=True, disks=(DiskSpec(Path("/d")),)),
        name="m",
        cid=2**32 - 2,
        directory=Path("/run/m"),
        accelerator=Accelerator.TCG,
        backend=backend,
        qemu="/usr/bin/qemu",
        kernel=Path("/käse/k e r n e l"),
        initrd=Path("/i"),
        kernel_args=("quiet", 'a="b c"'),
        ready_port=None,
    )
    plan = LaunchPlan(
        directory=Path("/run/m"),
        evidence=Path("/state/m"),
        name="m",
        cid=hardware.cid,
        timeout_s=0.1,
        qemu=plan_qemu(hardware),
        record={"name": "m", "cid": 3, "vsock": None, "started": 1.5},
        companion_logs=tuple(list_companion_logs().values()),
    )
    with_snapshot = replace(plan, snapshot=SnapshotPlan(Path("/käse"), 131, token="/t"))
    assert parse_launch_plan(with_snapshot.render()) == with_snapshot
    text = plan.render()
    assert len(text) < MAX_PLAN_BYTES / 10
    assert parse_launch_plan(text) == plan
    companions = [fitting.companion for fitting in plan.qemu.fittings if fitting.companion is not None]
    assert {companion.log for companion in companions} <= set(plan.companion_logs) <= set(LOG_KINDS.values())


@pytest.mark.parametrize("stage", list(Stage))
def test_report_is_the_same_after_its_journey(stage: Stage) -> None:
    report = Report(stage, "brief", "line 1\nline 2 \u20ac", "hint", is_expected=stage is Stage.FAILED)
    assert parse_report(report.render()) == report


def test_report_of_anything_fits_into_its_line() -> None:
    flood = "\U0001f600" * 1_000_000
    line = Report(Stage.FAILED, flood, flood + "the end", flood).render()
    assert len(line) <= MAX_REPORT_LINE_BYTES
    report = parse_report(line)
    assert len(report.details) == MAX_DETAILS_CHARACTERS
    assert report.details.endswith("the end")
