"""What a builder is started with."""

from dataclasses import dataclass

from vmkit.image.build import BuiltImage
from vmkit.machine.spec import MachineSpec

# Of the length before an order on its socket.
LENGTH_BYTES = 4
MAX_ORDER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """A snapshot to make. built: the image, so that a builder builds none. directory: where `up` was called."""

    spec: MachineSpec
    built: BuiltImage
    key: str
    directory: str
