"""The architectures that a guest can have, a row each: everything that differs from one to another. Pure.

The names are Debian's. The host is one of amd64, which emulates the others. docs/howto/architectures.md shows the
table to a person, and the measurements behind it are in docs/explanation/decisions.md.
"""

import os
import struct
from dataclasses import dataclass

from vmkit.errors import ConfigError

# The architecture of the hosts that vmkit runs on.
HOST = "amd64"
# elf.h: e_ident, e_type, e_machine.
_ELF = b"\x7fELF"
_MACHINE_AT = 18
_ELF_HEAD_BYTES = 20


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    qemu: QEMU's program. package: Debian's package of it. board: the value of -machine. cpu: the model for TCG.
    console: the kernel's name of the first serial line. command_line_bytes: the kernel cuts a longer one silently.
    kernel: the package of the kernel that images take. triplet: the folder of the libraries. loader: the path of the
    dynamic loader, as programs name it, without the first slash. elf_machine: the number in a program's header.
    kernel_args: words of the kernel's command line.
    has_port: PCI devices are plugged into a root port; else into the root bus.
    has_kernel_layer: vmkit has the program that raises the wall's kernel layer.
    has_oem_strings: the firmware has tables, in which the guest finds its token. Else it is a file of the initramfs.
    """

    name: str
    qemu: str
    package: str
    board: str
    cpu: str
    console: str
    command_line_bytes: int
    kernel: str
    triplet: str
    loader: str
    elf_machine: int
    kernel_args: tuple[str, ...] = ()
    has_port: bool = True
    has_kernel_layer: bool = False
    has_oem_strings: bool = False

    @property
    def is_emulated(self) -> bool:
        """Whether the host's processor cannot run it."""
        return self.name != HOST

    def expand(self, pattern: str) -> str:
        """A pattern of paths with this architecture's words in the places of {triplet} and {loader}."""
        return pattern.replace("{triplet}", self.triplet).replace("{loader}", self.loader)


# The kernels' own limits of the command line are COMMAND_LINE_SIZE - 1 (arch/*/include/asm/setup.h). On s390x it is
# what QEMU 7.2 passes on (hw/s390x/ipl.h).
_ROWS = (
    Architecture(
        name="amd64",
        qemu="qemu-system-x86_64",
        package="qemu-system-x86",
        # Devices that no guest of ours uses cost boot time: SATA, SMBus, USB and the HPET are off.
        board="q35,sata=off,smbus=off,usb=off,hpet=off",
        # cmpxchg16b goes wrong when an interrupt lands on it in QEMU 7.2's TCG: guests under vsock load double-fault in
        # kmalloc. erms and fsrm have the guest copy and clear memory byte by byte, which an emulator does one by one.
        cpu="max,cx16=off,erms=off,fsrm=off",
        console="ttyS0",
        command_line_bytes=2047,
        kernel="linux-image-cloud-amd64",
        triplet="x86_64-linux-gnu",
        loader="usr/lib64/ld-linux-x86-64.so.2",
        elf_machine=62,
        # The kernel waits for ten timer interrupts, counted in processor cycles, and panics where they do not come. A
        # busy host gives an emulator too little time for them. Under KVM the kernel leaves this check out by itself.
        kernel_args=("no_timer_check",),
        has_kernel_layer=True,
        has_oem_strings=True,
    ),
    Architecture(
        name="arm64",
        qemu="qemu-system-aarch64",
        package="qemu-system-arm",
        # The second version of the interrupt controller has room for 8 processors.
        board="virt,gic-version=3",
        # The model `max` authenticates pointers by the book, and boots in three times the time.
        cpu="cortex-a72",
        console="ttyAMA0",
        command_line_bytes=2047,
        kernel="linux-image-cloud-arm64",
        triplet="aarch64-linux-gnu",
        loader="usr/lib/ld-linux-aarch64.so.1",
        elf_machine=183,
    ),
    Architecture(
        name="riscv64",
        qemu="qemu-system-riscv64",
        package="qemu-system-misc",
        board="virt",
        # QEMU 7.2 has no model `max` here.
        cpu="rv64",
        console="ttyS0",
        command_line_bytes=1023,
        kernel="linux-image-riscv64",
        triplet="riscv64-linux-gnu",
        loader="usr/lib/ld-linux-riscv64-lp64d.so.1",
        elf_machine=243,
    ),
    Architecture(
        name="s390x",
        qemu="qemu-system-s390x",
        package="qemu-system-misc",
        board="s390-ccw-virtio",
        cpu="max",
        console="ttysclp0",
        command_line_bytes=895,
        kernel="linux-image-s390x",
        triplet="s390x-linux-gnu",
        loader="usr/lib/ld64.so.1",
        elf_machine=22,
        has_port=False,
    ),
)
ARCHITECTURES = {row.name: row for row in _ROWS}


def find_architecture(name: str) -> Architecture:
    """The row of a name. Raises ConfigError."""
    try:
        return ARCHITECTURES[name]
    except KeyError as error:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"there is no architecture '{name}'; the architectures are: {known}") from error


def find_package(qemu: str) -> str:
    """Debian's package of a QEMU, by its path; that of amd64's for an unknown one."""
    name = os.path.basename(qemu)  # noqa: PTH119  (a string, and not always a path)
    return next((row.package for row in _ROWS if row.qemu == name), ARCHITECTURES[HOST].package)


def find_elf_architecture(head: bytes) -> str:
    """The architecture of an ELF file of 64 bits, by its first bytes; "" for another file or processor."""
    if len(head) < _ELF_HEAD_BYTES or not head.startswith(_ELF):
        return ""
    (machine,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, _MACHINE_AT)
    return next((row.name for row in _ROWS if row.elf_machine == machine), "")
