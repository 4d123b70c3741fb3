"""The core dumps of the guest's programs, which the monitor keeps (vmkit.monitor.cores). QEMU has nothing of it."""

from typing import TYPE_CHECKING

from vmkit.crashes.place import require_crashes_folder
from vmkit.machine.parts.part import Option, OptionKind, Part

if TYPE_CHECKING:
    from vmkit.machine.spec import MachineSpec


class CoresPart(Part):
    """`cores`: whether they are kept."""

    name = "core_dumps"
    options = (
        Option(
            "cores",
            OptionKind.SWITCH,
            False,
            flag="--cores",
            help="Keep the core dumps of the guest's programs, and its failed services (see `vmkit crashes`).",
            is_python=True,
        ),
    )

    def check_host(self, spec: "MachineSpec") -> None:
        """A folder that cannot be used is an error of `up`, and not of the crash."""
        if spec.cores:
            require_crashes_folder()

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"cores": spec.cores}
