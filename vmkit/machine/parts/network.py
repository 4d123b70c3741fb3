"""A network device, which a machine has only when it is asked for: measurements compare vsock with it."""

from typing import TYPE_CHECKING

from vmkit.machine.parts.part import Part

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware


class NetworkPart(Part):
    """`netdev`: what is behind the device, as QEMU's -netdev has it, without an id."""

    name = "network"

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        if hardware.netdev is None:
            return ()
        # Without the firmware to boot from a network, which not every host has.
        return ("-netdev", f"{hardware.netdev},id=net0", "-device", "virtio-net-pci,netdev=net0,romfile=")
