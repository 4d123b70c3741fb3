"""The vsock device: the kernel's (vhost), or our own, a process beside QEMU that is vmkit.vsock."""

import os
import sys
from typing import TYPE_CHECKING

from vmkit.machine.hardware import USER_READY_PORT
from vmkit.machine.launch import Layout
from vmkit.machine.parts.part import (
    CONTROL_MARK,
    FRONTEND_MARK,
    LISTENER_MARK,
    Companion,
    Fitting,
    JsonObject,
    Part,
    QmpCommand,
)
from vmkit.machine.spec import Backend

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware

DEVICE_ID = "vsock0"
CHARDEV_ID = "vsock-char"
FD_NAME = "vsock-fd"
ROOT_PORT_ID = "vsock-port"
ROOT_BUS_ID = "pci.0"


class VsockPart(Part):
    """Every machine has it. It is plugged over QMP, because QEMU gets its descriptor there."""

    name = "vsock"
    log = "vsock.log"

    def plan_addresses(self, hardware: "Hardware") -> dict[str, object]:
        is_ours = hardware.backend is Backend.USER
        return {"vsock": str(hardware.directory / Layout.VSOCK) if is_ours else None}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        if not hardware.architecture.has_port:
            return ()
        # Without ACPI the guest controls the power of the port, and takes five seconds to turn it on.
        power = ",power_controller_present=off" if hardware.architecture.is_emulated else ""
        return ("-device", f"pcie-root-port,id={ROOT_PORT_ID},slot=1{power}")

    def plan_fitting(self, hardware: "Hardware") -> Fitting:
        bus = ROOT_PORT_ID if hardware.architecture.has_port else ROOT_BUS_ID
        if hardware.backend is Backend.VHOST:
            device: JsonObject = {
                "driver": "vhost-vsock-pci",
                "id": DEVICE_ID,
                "bus": bus,
                "guest-cid": hardware.cid,
                "vhostfd": FD_NAME,
            }
            # The next machine of a snapshot gets a descriptor and a CID of its own.
            return Fitting(self.name, plug=(QmpCommand("device_add", device),), fd_name=FD_NAME, device=DEVICE_ID)
        address: JsonObject = {"addr": {"type": "fd", "data": {"str": FD_NAME}}, "server": False}
        chardev: JsonObject = {"id": CHARDEV_ID, "backend": {"type": "socket", "data": address}}
        device = {"driver": "vhost-user-vsock-pci", "id": DEVICE_ID, "bus": bus, "chardev": CHARDEV_ID}
        return Fitting(
            self.name,
            plug=(QmpCommand("chardev-add", chardev), QmpCommand("device_add", device)),
            fd_name=FD_NAME,
            companion=plan_companion(hardware),
            ready_socket=f"{Layout.VSOCK}_{USER_READY_PORT}",
        )


def plan_companion(hardware: "Hardware") -> Companion:
    """Our device's process. VMKIT_NO_SANDBOX=1 in the environment takes its sandbox away."""
    argv = (
        sys.executable, "-P", "-m", "vmkit.vsock",
        "--guest-cid", str(hardware.cid),
        "--uds-path", str(hardware.directory / Layout.VSOCK),
        "--vhost-user-fd", FRONTEND_MARK,
        "--listen-fd", LISTENER_MARK,
        "--control-fd", CONTROL_MARK,
        "--privileged-port", str(USER_READY_PORT),
        *(("--no-sandbox",) if os.environ.get("VMKIT_NO_SANDBOX") == "1" else ()),
    )  # fmt: skip
    return Companion(
        argv,
        title="vsock device",
        kind="device",
        log=VsockPart.log,
        device=DEVICE_ID,
        removal=(QmpCommand("chardev-remove", {"id": CHARDEV_ID}),),
        listen=Layout.VSOCK,
        control=Layout.VSOCK_CONTROL,
    )
