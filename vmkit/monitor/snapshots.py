"""The monitor's work for a snapshot: saves the guest's memory and QEMU's state, and loads both again.

Order of a save: freeze the guest, unplug what cannot be saved, let it settle, stop it, write QEMU's state and then the
memory. Order of a restore: the memory is filled while QEMU starts, for QEMU does not look at it before it loads the
state; then the parts are plugged as at a boot, and the guest runs and is thawed.
"""

import asyncio
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.errors import MachineError
from vmkit.machine.launch import SnapshotPlan
from vmkit.snapshots.pages import DamagedError, load_pages, save_pages
from vmkit.snapshots.store import (
    MEMORY,
    SECRET,
    STATE,
    Record,
    check_state,
    open_new,
    open_own,
    read_snapshot,
    write_record,
)
from vsh.limits import find_remedy
from vsh.token import make_token_text, read_token

if TYPE_CHECKING:
    from vmkit.monitor.fittings import Fittings
    from vmkit.monitor.memory import GuestMemory
    from vmkit.monitor.qmp import Qmp
    from vsh.address import Address
    from vsh.freezing import Thawed

# A guest under emulation on a busy host takes seconds for a session.
FREEZE_DEADLINE_S = 60.0
# A guest goes on for a while with what the unplugging began; saved before its end, every restored guest would do the
# rest first, which took 0.1 s of each.
SETTLE_S = 2.5


class Restore:
    """The start of one machine from a snapshot. Begins at once to fill the guest's memory. Invariant: awaits close().

    Raises OSError where the memory cannot have its size.
    """

    def __init__(self, plan: SnapshotPlan, memory: "GuestMemory", timeout_s: float) -> None:
        """timeout_s: of the whole start, which ends a thaw sooner than the thaw's own deadline."""
        self._plan = plan
        self._timeout_s = timeout_s
        memory.set_size(plan.memory_mib << 20)
        self._filling = asyncio.create_task(memory.use(self._fill))

    async def load(self, qmp: "Qmp") -> None:
        """Waits for the pages, and has QEMU load the rest. Raises DamagedError, MachineError."""
        await self._filling
        with open_own(self._plan.folder, STATE, os.O_RDWR) as file:
            await qmp.load_state(file.fileno())

    async def thaw(self, address: "Address", hostname: str) -> "Thawed":
        """Makes a machine of its own of the restored guest. Raises VshError."""
        address.token_file = str(self._plan.folder / SECRET)
        return await asyncio.to_thread(_thaw, address, hostname, self._plan.token, self._timeout_s)

    async def close(self) -> None:
        """Waits until the memory is no longer filled."""
        await asyncio.gather(self._filling, return_exceptions=True)

    def _fill(self, memory_fd: int) -> None:
        snapshot = read_snapshot(self._plan.folder)
        if snapshot.record.memory_mib != self._plan.memory_mib:
            raise DamagedError("the snapshot is of a machine with another amount of memory")
        check_state(snapshot)
        with open_own(self._plan.folder, MEMORY) as file:
            load_pages(file.fileno(), snapshot.record.runs, memory_fd)


async def save(folder: Path, memory: "GuestMemory", qmp: "Qmp", fittings: "Fittings", address: "Address") -> None:
    """Saves a guest that is ready into a folder; its sessions have ended then. Raises MachineError."""
    try:
        await _save(folder, memory, qmp, fittings, address)
    except OSError as error:
        text = f"cannot write the snapshot: {error.strerror or error}"
        raise MachineError(text, hint=find_remedy(error)) from error


async def _save(folder: Path, memory: "GuestMemory", qmp: "Qmp", fittings: "Fittings", address: "Address") -> None:
    secret = folder / SECRET
    with open_new(secret) as file:
        file.write(make_token_text())
    await asyncio.to_thread(_freeze, address, secret)
    await fittings.unplug()
    await asyncio.sleep(SETTLE_S)
    await qmp.execute("stop")
    with open_new(folder / STATE) as file:
        await qmp.save_state(file.fileno())
    await memory.use(functools.partial(_write, folder))


def _write(folder: Path, memory_fd: int) -> None:
    memory_bytes = os.fstat(memory_fd).st_size
    with open_new(folder / MEMORY) as file:
        runs = save_pages(memory_fd, memory_bytes, file.fileno())
    state = (folder / STATE).read_bytes()
    # `vmkit snapshot make` adds what only it knows.
    write_record(
        folder,
        Record(
            key="",
            image="",
            facts={},
            memory_mib=memory_bytes >> 20,
            made=0.0,
            state_bytes=len(state),
            state_sha256=hashlib.sha256(state).hexdigest(),
            runs=tuple(runs),
        ),
    )


def _freeze(address: "Address", secret: Path) -> None:
    # Imported here: few machines are saved.
    from vsh.freezing import freeze  # noqa: PLC0415

    freeze(address, read_token(str(secret)), timeout_s=FREEZE_DEADLINE_S)


def _thaw(address: "Address", hostname: str, token_file: str, timeout_s: float) -> "Thawed":
    from vsh.freezing import make_thaw, thaw  # noqa: PLC0415  (see _freeze)

    token = read_token(token_file) if token_file else b""
    return thaw(address, make_thaw(hostname, token), timeout_s=timeout_s)
