"""One crash for a service that fails because its main process leaves a core.

The core and the failure come by two connections, in any order. The second one finds the first by the process, and both
become the crash of the core, with the facts of the service.
"""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmkit.crashes.record import Crash, CrashKind, FailedService, Program, render_crash
from vmkit.crashes.store import RECORD, KeptCrash, list_of, remove
from vmkit.entries.entry import write_record
from vmkit.errors import HostError, MachineError

# Between the core of a process and the failure of its service. Another process may have the number later.
MAX_APART_S = 120.0
# Within one monitor. No other program makes crashes of the same machine at that time.
_LOCK = threading.Lock()


def join_core(root: Path, machine: str, crash: Crash, publish: Callable[[Crash], Path]) -> Path:
    """Publishes the crash of a core, and removes that of the service which it made fail. Raises OSError."""
    with _LOCK:
        kept = _find(root, machine, lambda other: _fits(crash.program, other.service, crash.at_s - other.at_s))
        if kept is None or kept.crash is None or kept.crash.kind is not CrashKind.SERVICE:
            return publish(crash)
        folder = publish(add_service(crash, kept.crash.service))
        with contextlib.suppress(MachineError):
            remove(kept)
        return folder


def join_service(root: Path, machine: str, crash: Crash, publish: Callable[[Crash], Path]) -> tuple[Path, bool]:
    """Adds a service's failure to the crash of its core, or publishes it. Returns the folder, and whether it is new.

    Raises OSError.
    """
    with _LOCK:
        kept = _find(root, machine, lambda other: _fits(other.program, crash.service, crash.at_s - other.at_s))
        if kept is not None and kept.crash is not None and kept.crash.service is None:
            # Its user may have removed it in this moment.
            with contextlib.suppress(FileNotFoundError):
                write_record(kept.folder / RECORD, render_crash(add_service(kept.crash, crash.service)))
                return kept.folder, False
        return publish(crash), True


def add_service(crash: Crash, service: FailedService | None) -> Crash:
    """The crash of a core that has made a service fail."""
    if service is None:
        return crash
    return replace(crash, service=service, brief=f"{service.unit} failed: {crash.brief}")


def _find(root: Path, machine: str, fits: Callable[[Crash], bool]) -> KeptCrash | None:
    """The newest crash that fits."""
    try:
        found = list_of(root, machine)
    except HostError:
        return None
    return next((kept for kept in reversed(found) if kept.crash is not None and fits(kept.crash)), None)


def _fits(program: Program | None, service: FailedService | None, apart_s: float) -> bool:
    """Whether the core is of the service's main process. A core that the limit cut ends as a process without one."""
    if program is None or service is None or abs(apart_s) > MAX_APART_S:
        return False
    is_same = (program.pid, program.signal) == (service.pid, service.status)
    return is_same and f"/{service.unit}/" in f"{program.cgroup}/"
