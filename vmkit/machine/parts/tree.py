"""A kernel of the user's own with its modules: from its build tree, or from a folder of modules beside `kernel`."""

from typing import TYPE_CHECKING

from vmkit.architectures import HOST
from vmkit.errors import ConfigError
from vmkit.machine.parts.part import Option, OptionKind, Part
from vmkit.machine.spec import read_path

if TYPE_CHECKING:
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec


class TreePart(Part):
    """`tree`: the build tree. `modules`: lib/modules/VERSION. vmkit.trees reads both."""

    name = "tree"
    options = (
        Option(
            "tree",
            OptionKind.PATH,
            flag="--tree",
            metavar="DIR",
            help="Boot the kernel of this build tree, with the modules that the machine needs from there.",
            read=read_path,
            is_python=True,
        ),
        Option(
            "modules",
            OptionKind.PATH,
            flag="--modules",
            metavar="DIR",
            help="Take the modules for the kernel of --kernel from this folder, as modules_install makes it.",
            read=read_path,
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if spec.architecture != HOST and (spec.tree is not None or spec.modules is not None):
            raise ConfigError(
                f"--tree and --modules are for machines of {HOST}, and this one is {spec.architecture}",
                hint="give the kernel alone: --kernel FILE",
            )
        if spec.tree is not None and spec.kernel is not None:
            raise ConfigError("--tree excludes --kernel: the tree has a kernel", hint="leave one of them out")
        if spec.tree is not None and spec.modules is not None:
            raise ConfigError("--tree excludes --modules: the tree has its modules", hint="leave one of them out")
        if spec.modules is not None and spec.kernel is None:
            raise ConfigError("--modules needs the kernel that they are for", hint="give it, too: --kernel FILE")

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"tree": None if spec.tree is None else str(spec.tree)}

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        """For gdb the kernel stays at the addresses that its vmlinux has."""
        spec = hardware.spec
        is_debugged = spec.tree is not None and (spec.gdb or spec.gdb_port is not None)
        return ("nokaslr",) if is_debugged else ()
