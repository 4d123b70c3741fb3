"""The registry of pools: one entry each (vmkit.entries), by the pool's name. Its keeper holds the lock for life."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmkit.entries.entry import NewEntry, discard, make_entry, read_entries, sweep_all, write_record
from vmkit.entries.folder import explain_errors, hold_registry, open_runtime_directory
from vmkit.errors import HostError, MachineError, NameInUseError
from vmkit.machine.registry import MAX_SOCKET_PATH_BYTES
from vsh.registry import find_runtime_directory

POOLS = "pools"
RECORD = "pool.json"
CONTROL = "control.sock"


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """A pool that runs. directory: where its control socket is. pid: its keeper's."""

    name: str
    image: str
    size: int
    pid: int
    started: float
    directory: Path


@contextlib.contextmanager
def keep(name: str, image: str, size: int) -> Iterator["OwnPool"]:
    """Makes an entry of this process. Others do not see it before publish(). The end of the block removes it."""
    root = open_runtime_directory()
    folder = root / POOLS
    with explain_errors(root):
        folder.mkdir(mode=0o700, exist_ok=True)
        with hold_registry(root):
            sweep_all(folder)
            made = contextlib.ExitStack()
            entry = made.enter_context(make_entry(folder, f"{name}.{os.getpid()}"))
    with made:
        try:
            yield OwnPool(entry, name, image, size)
        finally:
            discard(entry.directory)


def check_control_path(directory: Path) -> None:
    """Raises HostError when the control socket would have a longer path than the kernel takes."""
    path = directory / CONTROL
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise HostError(
            f"the path of the pool's socket has {length} bytes, and the kernel takes {MAX_SOCKET_PATH_BYTES}: {path}",
            hint="set VMKIT_RUNTIME_DIR to a shorter path, or choose a shorter --name",
        )


class OwnPool:
    """Our own entry."""

    def __init__(self, entry: NewEntry, name: str, image: str, size: int) -> None:
        self._entry = entry
        self._name = name
        self._image = image
        self._size = size

    @property
    def directory(self) -> Path:
        """Its present path."""
        return self._entry.directory

    def publish(self) -> None:
        """Shows the pool to others. Raises NameInUseError, HostError."""
        folder = self.directory.parent
        with explain_errors(folder.parent), hold_registry(folder.parent):
            if (folder / self._name).exists():
                raise NameInUseError(
                    f"a pool named '{self._name}' is running",
                    hint=f"vmkit pool stop {self._name}, or choose another --name",
                )
            record = {"name": self._name, "image": self._image, "size": self._size, "pid": os.getpid()}
            write_record(self.directory / RECORD, {**record, "started": time.time()})
            self._entry.publish(self._name)


def read_pools() -> list[PoolEntry]:
    """Every pool that runs, by name."""
    return read_entries(Path(find_runtime_directory()) / POOLS, RECORD, _parse)


def pick_pool(name: str | None) -> PoolEntry:
    """The pool of that name, or the only one. Raises MachineError."""
    pools = read_pools()
    if name is None and len(pools) == 1:
        return pools[0]
    known = ", ".join(pool.name for pool in pools)
    if name is None:
        if pools:
            raise MachineError("several pools are running: name one", hint=known)
        raise MachineError("no pool is running", hint="start one: vmkit pool start")
    for pool in pools:
        if pool.name == name:
            return pool
    raise MachineError(
        f"no pool named '{name}' is running", hint=f"running: {known}" if known else "start one: vmkit pool start"
    )


def render_pool(pool: PoolEntry) -> dict[str, object]:
    """A pool for JSON."""
    return {**asdict(pool), "directory": str(pool.directory)}


def _parse(record: Any, directory: Path) -> tuple[str, PoolEntry]:
    pool = PoolEntry(
        name=str(record["name"]),
        image=str(record["image"]),
        size=int(record["size"]),
        pid=int(record["pid"]),
        started=float(record["started"]),
        directory=directory,
    )
    return pool.name, pool
