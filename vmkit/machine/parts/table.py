"""The parts that a machine can have, a row each."""

from vmkit.machine.parts.cores import CoresPart
from vmkit.machine.parts.disk import DiskPart
from vmkit.machine.parts.gdb import GdbPart
from vmkit.machine.parts.network import NetworkPart
from vmkit.machine.parts.part import Part
from vmkit.machine.parts.ports import PortsPart
from vmkit.machine.parts.recording import RecordingPart
from vmkit.machine.parts.seed import SeedPart
from vmkit.machine.parts.share import SharePart
from vmkit.machine.parts.system import SystemPart
from vmkit.machine.parts.tree import TreePart
from vmkit.machine.parts.vmcore import VmcorePart
from vmkit.machine.parts.vsock import VsockPart

# In the order of QEMU's argv, where a device's place decides its address on the bus.
PARTS: tuple[Part, ...] = (
    VsockPart(),
    TreePart(),
    DiskPart(),
    SharePart(),
    PortsPart(),
    NetworkPart(),
    GdbPart(),
    RecordingPart(),
    SystemPart(),
    SeedPart(),
    VmcorePart(),
    CoresPart(),
)


def list_companion_logs() -> dict[str, str]:
    """The logs of the parts' companions: the file, by the part's name."""
    return {part.name: part.log for part in PARTS if part.log}
