"""Free ports: a folder that is shared by virtiofs is a device, which is plugged while the guest runs."""

from typing import TYPE_CHECKING

from vmkit.machine.parts.part import Fitting, Part

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware

# Each costs every boot some milliseconds, also of machines that share nothing.
PORT_IDS = ("folder-port-0", "folder-port-1")
# Slots 1 and 2 are those of vsock and of a root.
FIRST_SLOT = 3


class PortsPart(Part):
    """Every machine of this host's architecture has them, so that a snapshot fits each."""

    name = "ports"

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        words: list[str] = []
        for slot, port in enumerate(_list_ports(hardware), FIRST_SLOT):
            words += ("-device", f"pcie-root-port,id={port},slot={slot}")
        return tuple(words)

    def plan_fitting(self, hardware: "Hardware") -> Fitting | None:
        ports = _list_ports(hardware)
        return Fitting(self.name, ports=ports) if ports else None


def _list_ports(hardware: "Hardware") -> tuple[str, ...]:
    architecture = hardware.architecture
    return PORT_IDS if architecture.has_port and not architecture.is_emulated else ()
