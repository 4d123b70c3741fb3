"""A network device, which a machine has only when it is asked for: measurements compare vsock with it."""

from typing import TYPE_CHECKING

from vmkit.machine.parts.part import Option, OptionKind, Part

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware


class NetworkPart(Part):
    """`netdev`: what is behind the device, as QEMU's -netdev has it, without an id."""

    name = "network"
    options = (Option("netdev", OptionKind.TEXT, is_python=True),)

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        if hardware.spec.netdev is None:
            return ()
        # Without the firmware to boot from a network, which not every host has.
        return ("-netdev", f"{hardware.spec.netdev},id=net0", "-device", "virtio-net-pci,netdev=net0,romfile=")
