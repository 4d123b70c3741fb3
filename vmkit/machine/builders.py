"""Builders: processes of ours that make a snapshot in the background (vmkit.builder), an entry each, by its key.

`up` starts one, and others find it here and end it. There is one at a time: each takes the memory of a machine.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmkit.entries.entry import discard, make_entry, read_entries, sweep_all, write_record
from vmkit.entries.folder import explain_errors, hold_registry
from vmkit.errors import MachineError
from vmkit.machine import stop
from vsh.registry import find_machine, find_runtime_directory

BUILDERS = "builders"
RECORD = "builder.json"
# A builder that is told to end kills its machine first. It has little processor time on a busy host.
END_DEADLINE_S = 10.0
KILL_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Builder:
    """A process that makes the snapshot of a key. machine: the name of the machine that it saves."""

    key: str
    image: str
    memory_mib: int
    machine: str
    pid: int
    started: float
    directory: Path


def find_folder(root: Path) -> Path:
    """The folder of the entries in a runtime directory."""
    return root / BUILDERS


def add_builder(root: Path, key: str, record: dict[str, object], start: Callable[[int], int]) -> bool:
    """Starts a builder, unless there is one. The caller holds the registry.

    start: starts the process, gives it the lock's descriptor, and returns its number. Raises OSError, VshError.
    """
    folder = find_folder(root)
    folder.mkdir(mode=0o700, exist_ok=True)
    sweep_all(folder)
    if any(folder.iterdir()):
        return False
    with make_entry(folder, key) as entry:
        try:
            pid = start(entry.lock_fd)
            write_record(entry.directory / RECORD, {"key": key, **record, "pid": pid, "started": time.time()})
            entry.publish(key)
        except BaseException:
            discard(entry.directory)
            raise
    return True


def read_builders() -> list[Builder]:
    """Every builder that works."""
    return read_entries(find_folder(Path(find_runtime_directory())), RECORD, _parse)


def find_builder(key: str) -> Builder | None:
    """The builder of a snapshot."""
    return next((builder for builder in read_builders() if builder.key == key), None)


def end_builder(builder: Builder) -> None:
    """Ends a builder, its machine, and what it has written so far. Raises MachineError."""
    machine = find_machine(name=builder.machine)
    with contextlib.ExitStack() as stack:
        try:
            process = os.pidfd_open(builder.pid)
        except ProcessLookupError:
            process = None
        if process is not None:
            stack.callback(os.close, process)
            # Read again: while the lock is held, the number is the builder's.
            now = find_builder(builder.key)
            if now is not None and now.pid == builder.pid:
                _end_process(process, builder)
    # A builder that was killed could not do so.
    left = find_machine(name=builder.machine)
    if machine is not None and left is not None and left.pid == machine.pid:
        stop.kill(left)
    _sweep()


def _end_process(process: int, builder: Builder) -> None:
    for number, deadline_s in ((signal.SIGTERM, END_DEADLINE_S), (signal.SIGKILL, KILL_DEADLINE_S)):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)
        if select.select([process], [], [], deadline_s)[0]:
            return
    raise MachineError(f"the process that makes a snapshot of {builder.image} does not end: {builder.pid}")


def _sweep() -> None:
    """Removes the entries of builders that are gone, and what they had written."""
    # `down` and `list` import no code that builds images, unless there is a builder to end.
    from vmkit.image.cache import open_cache  # noqa: PLC0415
    from vmkit.machine.restore import SNAPSHOTS_VARIABLE, open_store  # noqa: PLC0415

    root = Path(find_runtime_directory())
    if find_folder(root).is_dir():
        with hold_registry(root), explain_errors(root):
            sweep_all(find_folder(root))
    with open_cache(open_store().folder, "snapshots", SNAPSHOTS_VARIABLE) as cache:
        cache.sweep()


def _parse(record: Any, directory: Path) -> tuple[str, Builder]:
    builder = Builder(
        key=str(record["key"]),
        image=str(record["image"]),
        memory_mib=int(record["memory_mib"]),
        machine=str(record["machine"]),
        pid=int(record["pid"]),
        started=float(record["started"]),
        directory=directory,
    )
    return builder.key, builder
