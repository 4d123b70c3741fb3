"""Everything that decides QEMU's argv and the guest's kernel command line, as one value. Pure."""

from dataclasses import dataclass
from pathlib import Path

from vmkit.machine.spec import Accelerator, Backend, DiskSpec

# The port of the host that hears READY on the `user` backend, where every machine has ports of its own
# (the number is that of ChromeOS's startup listener).
USER_READY_PORT = 7777


@dataclass(frozen=True, slots=True)
class Hardware:
    """Everything that decides QEMU's argv. Paths exist, choices are made; ready_port None: the monitor will know it.

    nested: this host is itself emulated by QEMU.
    """

    name: str
    cid: int
    memory_mib: int
    cpus: int
    accelerator: Accelerator
    backend: Backend
    kernel: Path
    initrd: Path
    kernel_args: tuple[str, ...]
    append: str
    ready_port: int | None
    qemu: str
    # The machine's own directory.
    directory: Path = Path()
    # The file that holds the machine's token; None: it demands none.
    token: Path | None = None
    root: Path | None = None
    disks: tuple[DiskSpec, ...] = ()
    # Where gdb connects: a socket that the monitor makes, or a port of the loopback.
    gdb: bool = False
    gdb_port: int | None = None
    cpu: str | None = None
    netdev: str | None = None
    nested: bool = False
