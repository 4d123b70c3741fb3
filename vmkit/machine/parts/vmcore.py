"""A dump of the guest's memory, which the monitor keeps when the guest's kernel panics (vmkit.monitor.panics).

QEMU gets two devices. `pvpanic-pci` tells it of a panic, and it stops the guest there: with the kernel's panic=-1 the
memory would be gone before anybody could ask. `vmcoreinfo` takes the note by which debuggers find the kernel's
structures, and QEMU puts it into the dump. The guest needs a driver for each, which /init loads at the word.
"""

from typing import TYPE_CHECKING

from vmkit.architectures import HOST
from vmkit.crashes.place import require_crashes_folder
from vmkit.crashes.record import DumpFormat
from vmkit.errors import ConfigError
from vmkit.machine.parts.part import Option, OptionKind, Part

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

# /init of the images reads it.
WORD = "vmkit.vmcore"
FORMATS = tuple(format_.value for format_ in DumpFormat)


def read_format(word: str | None) -> str | None:
    """A format's word; None: no dump. Raises ConfigError."""
    if word is not None and word not in FORMATS:
        raise ConfigError(f"--vmcore must be one of {', '.join(FORMATS)}, not '{word}'")
    return word


class VmcorePart(Part):
    """`vmcore`: the format."""

    name = "panic_dump"
    options = (
        Option(
            "vmcore",
            OptionKind.CHOOSING_SWITCH,
            flag="--vmcore",
            metavar="[=FORMAT]",
            help="Keep a dump of the memory if the kernel panics: elf [default], or kdump, which is smaller.",
            words=FORMATS,
            read=read_format,
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.vmcore is not None and spec.architecture != HOST:
            raise ConfigError(
                f"--vmcore needs a guest of {HOST}, and the machine is {spec.architecture}", hint="leave --vmcore out"
            )

    def check_host(self, spec: "MachineSpec") -> None:
        """A folder that cannot be used is an error of `up`, and not of the panic."""
        if spec.vmcore is not None:
            require_crashes_folder()

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"vmcore": spec.vmcore}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        if hardware.spec.vmcore is None:
            return ()
        return ("-action", "panic=pause", "-device", "vmcoreinfo", "-device", "pvpanic-pci")

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        return () if hardware.spec.vmcore is None else (WORD,)
