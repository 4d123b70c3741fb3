"""The plan that `up` sends to the monitor, and the reports that come back until the machine is ready. No I/O.

Each value has its JSON. Reports are JSON lines on a socket. When `up` closes it or dies before the machine is ready,
the monitor undoes everything.
"""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vmkit.machine.argv import QemuPlan
from vmkit.machine.parts.part import parse_fitting

# A plan is an argv, a kernel command line of 2 KiB and a few paths.
MAX_PLAN_BYTES = 256 * 1024
MAX_REPORT_LINE_BYTES = 256 * 1024
# A character takes at most 12 bytes of JSON: a report with these ceilings fits into its line.
MAX_BRIEF_CHARACTERS = 2000
MAX_DETAILS_CHARACTERS = 16 * 1024
# The vsock device keeps 64 for itself, and each connection takes one; monitor and QEMU open about 20 each.
MIN_OPEN_FILES = 128


class Layout:
    """The names inside a machine's directory."""

    RECORD = "machine.json"
    LOCK = "lock"
    VSOCK = "vsock.sock"
    VSOCK_CONTROL = "device.sock"
    # Never one of LOGS: those are kept, and shown.
    TOKEN = "token"  # noqa: S105  (a file's name)
    INITRD = "initrd"
    CONTROL = "monitor.sock"
    CONSOLE_SOCKET = "console.sock"
    GDB_SOCKET = "gdb.sock"
    CONSOLE_LOG = "console.log"
    QMP_LOG = "qmp.log"
    QEMU_LOG = "qemu.log"
    MONITOR_LOG = "monitor.log"
    KERNEL_LOG = "kernel.log"
    SYSLOG = "syslog.jsonl"
    EVENTS = "events.jsonl"
    ARGV = "argv.txt"
    # Those of every machine. Parts add the logs of their companions.
    LOGS = (CONSOLE_LOG, QMP_LOG, QEMU_LOG, MONITOR_LOG, KERNEL_LOG, SYSLOG, EVENTS, ARGV)


class Stage(StrEnum):
    """What the monitor reports, in order; FAILED may come at any point and is the last."""

    STARTED = "started"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """The machine starts from the snapshot in `folder`.

    token: the file with the token of the guest's clients; "": they need none.
    """

    folder: Path
    memory_mib: int
    token: str = ""


@dataclass(frozen=True, slots=True)
class CrashPlan:
    """What the monitor keeps of the guest's crashes, below `folder`, the folder of all crashes.

    max_bytes: of the data in a dump. vmcore: the format of a dump of the memory at a panic; "": none. vmlinux: the
    kernel with its symbols; "": unknown. cores: keep the cores of programs. root:
    the disk or folder of the host that is the guest's root; "": it is the image's.
    """

    folder: Path
    max_bytes: int
    vmcore: str = ""
    vmlinux: str = ""
    cores: bool = False
    root: str = ""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything that the monitor needs for one machine.

    companion_logs: of every part, also of those that this machine lacks: a log of an earlier machine must not stay.
    is_owned: the machine lives no longer than the process that starts it. is_stored: the monitor holds the lock of the
    machine's folder of the data, too. reboots: a reset of the guest is a reboot, and does not end the machine.
    crashes: None where no crash can be kept.
    """

    directory: Path
    evidence: Path
    name: str
    cid: int
    timeout_s: float
    qemu: QemuPlan
    record: dict[str, object]
    companion_logs: tuple[str, ...] = ()
    is_owned: bool = False
    snapshot: SnapshotPlan | None = None
    is_stored: bool = False
    reboots: bool = False
    crashes: CrashPlan | None = None

    @property
    def ready_socket(self) -> str:
        """The socket in the directory at which READY arrives; "": it comes through the host's own vsock."""
        return next((fitting.ready_socket for fitting in self.qemu.fittings if fitting.ready_socket), "")

    def render(self) -> str:
        """As JSON."""
        value = asdict(self)
        value["directory"] = str(self.directory)
        value["evidence"] = str(self.evidence)
        if self.snapshot is not None:
            value["snapshot"]["folder"] = str(self.snapshot.folder)
        if self.crashes is not None:
            value["crashes"]["folder"] = str(self.crashes.folder)
        return json.dumps(value)


def parse_launch_plan(text: str) -> LaunchPlan:
    """A plan from its JSON, as `render` made it."""
    value = json.loads(text)
    qemu = value["qemu"]
    return LaunchPlan(
        directory=Path(value["directory"]),
        evidence=Path(value["evidence"]),
        name=value["name"],
        cid=value["cid"],
        timeout_s=value["timeout_s"],
        qemu=QemuPlan(
            argv=tuple(qemu["argv"]),
            fittings=tuple(parse_fitting(fitting) for fitting in qemu["fittings"]),
        ),
        record=value["record"],
        companion_logs=tuple(value["companion_logs"]),
        is_owned=value["is_owned"],
        snapshot=_parse_snapshot(value["snapshot"]),
        is_stored=value["is_stored"],
        reboots=value["reboots"],
        crashes=_parse_crashes(value["crashes"]),
    )


def _parse_snapshot(value: dict[str, Any] | None) -> SnapshotPlan | None:
    return None if value is None else SnapshotPlan(**{**value, "folder": Path(value["folder"])})


def _parse_crashes(value: dict[str, Any] | None) -> CrashPlan | None:
    return None if value is None else CrashPlan(**{**value, "folder": Path(value["folder"])})


@dataclass(frozen=True, slots=True)
class Report:
    """One line from the monitor. For FAILED: what a VmkitError needs, and whether the end was asked for."""

    stage: Stage
    brief: str = ""
    details: str = ""
    hint: str = ""
    is_expected: bool = False

    def render(self) -> bytes:
        """As one JSON line; of long details the end stays."""
        value = {
            "stage": self.stage.value,
            "brief": self.brief[:MAX_BRIEF_CHARACTERS],
            "details": self.details[-MAX_DETAILS_CHARACTERS:],
            "hint": self.hint[:MAX_BRIEF_CHARACTERS],
            "expected": self.is_expected,
        }
        return json.dumps(value).encode() + b"\n"


def parse_report(line: bytes) -> Report:
    """A report from its line."""
    value = json.loads(line)
    return Report(Stage(value["stage"]), value["brief"], value["details"], value["hint"], value["expected"])
