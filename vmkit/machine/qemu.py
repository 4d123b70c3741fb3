"""What a machine is made of becomes QEMU's argv and the devices to plug over QMP. Pure: opens nothing, starts nothing.

Why each option is there is said beside it; what was measured to choose them is in docs/explanation/decisions.md.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import ConfigError
from vmkit.machine.spec import MAX_KERNEL_COMMAND_LINE_BYTES, Accelerator, Backend, DiskMode, DiskSpec

# The port of the host that hears READY on the `user` backend, where every machine has ports of its own
# (the number is that of ChromeOS's startup listener).
USER_READY_PORT = 7777

# Stand in the argv for what only the monitor knows: its descriptors, and the port of its READY listener on `vhost`.
CONSOLE_CHARDEV = "{console}"
QMP_CHARDEV = "{qmp}"
GDB_CHARDEV = "{gdb}"
READY_PORT_MARK = "{ready_port}"
# Tells the guest that there is a token: one that cannot find it must not serve without.
TOKEN_WORD = "vmkit.token=smbios"  # noqa: S105  (a word, not a secret)
QMP_MONITOR = "chardev=qmp,mode=control"

# By this the guest's init tells the root from other disks. A serial has at most 20 bytes (linux/virtio_blk.h,
# VIRTIO_BLK_ID_BYTES).
ROOT_SERIAL = "vmkit-root"
# Tells a guest to load the driver of disks; one whose root is a disk has it.
DISKS_ARGUMENT = "vmkit.disks"

VSOCK_DEVICE_ID = "vsock0"
VSOCK_CHARDEV_ID = "vsock-char"
VSOCK_FD_NAME = "vsock-fd"
ROOT_PORT_ID = "vsock-port"

# `quiet` keeps the slow serial line out of the boot's time. panic=-1 turns every panic into a reset at once, and that
# ends the machine (reboot=shutdown). cryptomgr.notests saves the self tests of the kernel's ciphers, a quarter of a
# boot under TCG.
BASE_KERNEL_ARGS = ("console=ttyS0", "quiet", "panic=-1", "cryptomgr.notests")

JsonValue = None | bool | int | str | Mapping[str, "JsonValue"]


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


@dataclass(frozen=True, slots=True)
class QmpCommand:
    """One command for QEMU's monitor."""

    name: str
    arguments: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class QemuPlan:
    """What to start and what to plug. The argv holds marks where the monitor puts numbers."""

    argv: tuple[str, ...]
    plug: tuple[QmpCommand, ...]

    @property
    def has_gdb_socket(self) -> bool:
        """Whether the monitor makes a socket for gdb."""
        return GDB_CHARDEV in self.argv

    def render_argv(self, *, console_fd: int, qmp_fd: int, ready_port: int, gdb_fd: int | None = None) -> list[str]:
        """The argv with the descriptors and the port filled in. gdb_fd: a listening socket, where one is wanted."""
        numbers = {
            CONSOLE_CHARDEV: f"socket,id=console,fd={console_fd}",
            QMP_CHARDEV: f"socket,id=qmp,fd={qmp_fd}",
            GDB_CHARDEV: f"socket,id=gdb,fd={gdb_fd},server=on,wait=off",
        }
        return [numbers.get(word, word).replace(READY_PORT_MARK, str(ready_port)) for word in self.argv]

    def render_by_hand(self) -> list[str]:
        """The argv for a person's shell: not paused, the console in the terminal, nothing that needs vmkit."""
        left_out = (("-S",), ("-chardev", QMP_CHARDEV), ("-mon", QMP_MONITOR))
        words = list(self.argv)
        if "-smbios" in words:
            # The token lives and dies with a machine of vmkit's.
            at = words.index("-smbios")
            del words[at : at + 2]
        for option in left_out:
            at = words.index(option[-1]) - len(option) + 1
            del words[at : at + len(option)]
        if self.has_gdb_socket:
            words[words.index(GDB_CHARDEV)] = "socket,id=gdb,path=gdb.sock,server=on,wait=off"
        words[words.index(CONSOLE_CHARDEV)] = "stdio,id=console,mux=on,signal=off"
        return [word.replace(READY_PORT_MARK, str(USER_READY_PORT)).replace(f" {TOKEN_WORD}", "") for word in words]


def render_kernel_command_line(hardware: Hardware) -> str:
    """The guest's kernel command line: ours, the image's, the user's last, so that the user wins.

    Raises ConfigError where the kernel would silently cut it.
    """
    port = READY_PORT_MARK if hardware.ready_port is None else hardware.ready_port
    words = [*dict.fromkeys([*BASE_KERNEL_ARGS, *hardware.kernel_args]), f"vmkit.ready={port}"]
    if hardware.token is not None:
        words.append(TOKEN_WORD)
    if hardware.disks:
        words.append(DISKS_ARGUMENT)
    line = " ".join([*words, hardware.append]).strip()
    size_bytes = len(os.fsencode(line))
    if size_bytes > MAX_KERNEL_COMMAND_LINE_BYTES:
        raise ConfigError(
            f"the kernel command line is too long: {size_bytes} bytes of {MAX_KERNEL_COMMAND_LINE_BYTES}",
            hint="shorten --append or the image's kernel arguments",
        )
    return line


def plan_qemu(hardware: Hardware) -> QemuPlan:
    """QEMU's argv (paused, no display, no network and no disk but those asked for), and the vsock device to plug."""
    return QemuPlan(
        argv=(
            hardware.qemu,
            "-name", f"guest={hardware.name},process=vmkit-{hardware.name}",
            # Nothing that was not asked for: no VGA, no NIC, no floppy, no configuration of the host's.
            "-nodefaults", "-no-user-config", "-display", "none",
            # Paused until the device is plugged; a reset of the guest ends the machine instead of looping.
            "-S", "-action", "reboot=shutdown",
            # A guest that breaks into QEMU finds no execve, no setuid and no resource control there.
            "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-machine", _render_machine(hardware),
            *_plan_cpu(hardware),
            "-smp", str(hardware.cpus),
            "-m", f"{hardware.memory_mib}M",
            *_plan_memory(hardware),
            "-device", f"pcie-root-port,id={ROOT_PORT_ID},slot=1",
            *_plan_disks(hardware),
            *_plan_network(hardware),
            *_plan_gdb(hardware),
            "-chardev", CONSOLE_CHARDEV, "-serial", "chardev:console",
            "-chardev", QMP_CHARDEV, "-mon", QMP_MONITOR,
            "-kernel", str(hardware.kernel),
            "-initrd", str(hardware.initrd),
            "-append", render_kernel_command_line(hardware),
            *_plan_token(hardware),
        ),
        plug=_plan_plug(hardware),
    )  # fmt: skip


def _render_machine(hardware: Hardware) -> str:
    # Devices that no guest of ours uses cost boot time: SATA, SMBus, USB and the HPET are off.
    machine = "q35,sata=off,smbus=off,usb=off,hpet=off"
    return f"{machine},memory-backend=ram" if hardware.backend is Backend.USER else machine


def _plan_cpu(hardware: Hardware) -> tuple[str, ...]:
    if hardware.accelerator is Accelerator.KVM:
        return ("-accel", "kvm", "-cpu", hardware.cpu or "host")
    if hardware.nested:
        # Emulation inside emulation: a plain model is faster, and kernels panic on any that has cmpxchg16b.
        return ("-accel", "tcg,thread=single", "-cpu", hardware.cpu or "qemu64,-cx16")
    # cmpxchg16b goes wrong when an interrupt lands on it in QEMU 7.2's TCG: guests under vsock load double-fault in
    # kmalloc.
    return ("-accel", "tcg", "-cpu", hardware.cpu or "max,cx16=off")


def _plan_disks(hardware: Hardware) -> tuple[str, ...]:
    """The guest's disks in the order of their names there: /dev/vda is the root, where there is one."""
    root = () if hardware.root is None else ((ROOT_SERIAL, DiskSpec(hardware.root)),)
    words: list[str] = []
    for number, (serial, disk) in enumerate((*root, *((f"vmkit-{i}", disk) for i, disk in enumerate(hardware.disks)))):
        blockdev = {
            # Never guessed from the content: a guest that writes a header to its raw disk could name any file of ours.
            "driver": "qcow2" if disk.path.suffix == ".qcow2" else "raw",
            "node-name": f"disk{number}",
            "read-only": "on" if disk.mode is DiskMode.READ_ONLY else "off",
            "file.driver": "file",
            "file.filename": str(disk.path),
        }
        words += ["-blockdev", _render_options(blockdev)]
        words += ["-device", f"virtio-blk-pci,drive=disk{number},serial={serial}"]
    return tuple(words)


def _render_options(options: dict[str, str]) -> str:
    """QEMU's own form, key=value: JSON could not name a path that is not UTF-8. A comma is doubled."""
    return ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())


def _plan_network(hardware: Hardware) -> tuple[str, ...]:
    if hardware.netdev is None:
        return ()
    # Without the firmware to boot from a network, which not every host has.
    return ("-netdev", f"{hardware.netdev},id=net0", "-device", "virtio-net-pci,netdev=net0,romfile=")


def _plan_gdb(hardware: Hardware) -> tuple[str, ...]:
    if hardware.gdb:
        return ("-chardev", GDB_CHARDEV, "-gdb", "chardev:gdb")
    # Loopback alone: whoever reaches it owns the guest.
    return () if hardware.gdb_port is None else ("-gdb", f"tcp:127.0.0.1:{hardware.gdb_port}")


def _plan_memory(hardware: Hardware) -> tuple[str, ...]:
    if hardware.backend is Backend.USER:
        # The device process maps the guest's memory, so it must be shared.
        return ("-object", f"memory-backend-memfd,id=ram,size={hardware.memory_mib}M,share=on")
    return ()


def _plan_token(hardware: Hardware) -> tuple[str, ...]:
    """An OEM string of the firmware's tables: root alone reads them in the guest, and every kernel shows them."""
    if hardware.token is None:
        return ()
    # In QEMU's options a comma ends a value, and two are one.
    return ("-smbios", _render_options({"type": "11", "path": str(hardware.token)}))


def _plan_plug(hardware: Hardware) -> tuple[QmpCommand, ...]:
    if hardware.backend is Backend.VHOST:
        return (
            QmpCommand(
                "device_add",
                {
                    "driver": "vhost-vsock-pci",
                    "id": VSOCK_DEVICE_ID,
                    "bus": ROOT_PORT_ID,
                    "guest-cid": hardware.cid,
                    "vhostfd": VSOCK_FD_NAME,
                },
            ),
        )
    return (
        QmpCommand(
            "chardev-add",
            {
                "id": VSOCK_CHARDEV_ID,
                "backend": {
                    "type": "socket",
                    "data": {"addr": {"type": "fd", "data": {"str": VSOCK_FD_NAME}}, "server": False},
                },
            },
        ),
        QmpCommand(
            "device_add",
            {
                "driver": "vhost-user-vsock-pci",
                "id": VSOCK_DEVICE_ID,
                "bus": ROOT_PORT_ID,
                "chardev": VSOCK_CHARDEV_ID,
            },
        ),
    )
