"""Everything that decides QEMU's argv and the guest's kernel command line, as one value. Pure."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.architectures import Architecture, find_architecture
from vmkit.machine.spec import Accelerator, Backend, MachineSpec

if TYPE_CHECKING:
    from vmkit.machine.virtiofsd import Virtiofsd

# The port of the host that receives READY on the `user` backend, where every machine has ports of its own
# (the number is that of ChromeOS's startup listener).
USER_READY_PORT = 7777


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine's options, what was chosen for them, and its place.

    Paths exist, choices are made; ready_port None: the monitor will know it. root: of the options or of the image.
    nested: this host is itself emulated by QEMU. token: the file that holds it; None: the machine demands none.
    """

    spec: MachineSpec
    name: str
    cid: int
    directory: Path
    accelerator: Accelerator
    backend: Backend
    qemu: str
    kernel: Path
    initrd: Path
    kernel_args: tuple[str, ...]
    ready_port: int | None
    token: Path | None = None
    root: Path | None = None
    # Of a root that its user gave, for a guest that has to know: ext4, or ext4:2 for the second partition.
    root_type: str = ""
    # What serves a root that is a folder of the host, where QEMU does not do it itself.
    virtiofsd: "Virtiofsd | None" = None
    nested: bool = False
    is_restored: bool = False

    @property
    def architecture(self) -> Architecture:
        """Of the guest."""
        return find_architecture(self.spec.architecture)
