"""The kernel that a user gives a machine: `kernel`, or one with its modules, by `tree` or by `modules`.

Whether it can boot this machine is found before QEMU starts, and before a build where the image is not asked.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.machine.kernel import check_kernel
from vmkit.machine.live_root import NINE_P, list_kernel_ways
from vmkit.machine.source import read_root_of
from vmkit.machine.spec import Backend, MachineSpec

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.trees.config import Need
    from vmkit.trees.files import KernelFiles

# What the debian image has on its disk.
_DISK_TYPE = "ext4"


def read_kernel(spec: MachineSpec) -> "KernelFiles | None":
    """Checks the user's kernel, if there is one. None: it has no modules that vmkit knows of.

    Raises ConfigError, HostError.
    """
    if spec.tree is None and spec.modules is None:
        if spec.kernel is not None:
            check_kernel(spec.kernel, spec.architecture)
        return None
    # Most machines have the kernel of their image.
    from vmkit.trees.files import find_installed, find_tree  # noqa: PLC0415
    from vmkit.trees.initrd import check_kernel_config  # noqa: PLC0415

    if spec.tree is not None:
        files = find_tree(spec.tree)
        check_kernel(files.image)
    else:
        assert spec.modules is not None
        assert spec.kernel is not None, "its part has looked"
        check_kernel(spec.kernel)
        files = find_installed(spec.modules, spec.kernel)
    root = "" if spec.root is None else read_root_of(spec).type
    if spec.root_from is not None and not list_kernel_ways(files):
        root = NINE_P
    check_kernel_config(files, _find_needs(spec, root, spec.backend))
    return files


def fit_initrd(spec: MachineSpec, files: "KernelFiles", built: "BuiltImage", root_type: str, backend: Backend) -> Path:
    """The initramfs of the image with the kernel's modules. root_type: of the root that the user gave; "": none.

    Raises ConfigError, BuildError, HostError.
    """
    from vmkit.trees.initrd import check_kernel_config, extend_initrd, plan_modules  # noqa: PLC0415

    needs = _find_needs(spec, root_type or (_DISK_TYPE if built.root is not None else ""), backend)
    check_kernel_config(files, needs)
    archive = plan_modules(files, needs, built.modules, built.modules_available)
    return extend_initrd(built.initrd, built.digest, archive, _read_words)


def _read_words() -> str:
    """The commands of running machines, which name their initramfses."""
    from vmkit.machine.storage import read_words  # noqa: PLC0415 - only where a new initramfs was made

    return read_words()


def _find_needs(spec: MachineSpec, root_type: str, backend: Backend | None) -> "tuple[Need, ...]":
    from vmkit.trees.config import find_needs  # noqa: PLC0415

    return find_needs(root=root_type, has_disks=bool(spec.disks), has_token=backend is Backend.VHOST or spec.token)
