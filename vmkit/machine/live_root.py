"""How a folder of the host reaches a guest as its root: by virtiofs where that is safe, else by 9p."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmkit.errors import ConfigError
from vmkit.machine.virtiofsd import Virtiofsd, find_virtiofsd

if TYPE_CHECKING:
    from collections.abc import Container

    from vmkit.machine.spec import MachineSpec
    from vmkit.trees.files import KernelFiles

# As mount(8) has them, with the kernel's modules of these names.
NINE_P, VIRTIOFS = "9p", "virtiofs"
KERNEL_HINT = "give a kernel that has 9p: --tree DIR, or --kernel FILE with --modules DIR, such as those of this host"


@dataclass(frozen=True, slots=True)
class LiveRoot:
    """way: the file system that the guest mounts. virtiofsd: what serves it; reason: why it is not virtiofs."""

    way: str
    virtiofsd: Virtiofsd | None = None
    reason: str = ""


def has_image_kernel(spec: "MachineSpec") -> bool:
    """Whether the machine has the kernel of its image."""
    return spec.kernel is None and spec.tree is None


def choose_live_root(spec: "MachineSpec", ways: "Container[str]") -> LiveRoot:
    """The way for the folder of a spec. ways: those that the kernel has."""
    assert spec.root_from is not None
    if VIRTIOFS not in ways:
        return LiveRoot(NINE_P, reason="vmkit knows of no driver in this kernel")
    found = find_virtiofsd(spec.root_from, spec.memory_mib)
    return LiveRoot(VIRTIOFS, found) if found.program else LiveRoot(NINE_P, reason=found.trouble)


def list_image_ways(modules: "Container[str]") -> tuple[str, ...]:
    """Those of an image's kernel. Debian's kernels have virtiofs: vmkit adds the module where it is one."""
    return (VIRTIOFS, NINE_P) if NINE_P in modules else (VIRTIOFS,)


def list_kernel_ways(files: "KernelFiles | None") -> tuple[str, ...]:
    """Those of a kernel of the user's. None: its modules are not known, and 9p is what it must have."""
    if files is None:
        return (NINE_P,)
    from vmkit.trees.initrd import has_root  # noqa: PLC0415 - most machines have the kernel of their image

    return tuple(way for way in (VIRTIOFS, NINE_P) if has_root(files, way))


def check_image_kernel(spec: "MachineSpec", modules: "Container[str]") -> None:
    """Raises ConfigError where the kernel of the image has no way that this host has."""
    if spec.root_from is None or not has_image_kernel(spec) or NINE_P in modules:
        return
    found = find_virtiofsd(spec.root_from, spec.memory_mib)
    if not found.program:
        raise ConfigError(
            f"virtiofs cannot serve {spec.root_from} here, and the kernel of the image {spec.image} has no 9p",
            details=found.trouble,
            hint=f"{found.hint}; or {KERNEL_HINT}" if found.hint else KERNEL_HINT,
        )
