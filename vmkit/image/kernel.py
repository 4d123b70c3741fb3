"""Turns a Debian kernel package into a boot image and an image's modules, with the lists that modprobe needs.

Knows how Debian packs kernels (boot/vmlinuz-VERSION or vmlinux-VERSION, modules perhaps compressed). The recipe chooses
the modules. vmkit.image.modules finds what they need.
"""

import posixpath
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError
from vmkit.image.debian.deb import read_deb
from vmkit.image.formats.tree import FileKind, Node, Tree
from vmkit.image.formats.vmlinux import extract_vmlinux, find_vmlinux
from vmkit.image.modules import OPTIONAL_MODULES, ModuleSet, find_module_name

# The second where it is not packed: riscv64's.
_BOOT_IMAGES = ("vmlinuz-", "vmlinux-")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's boot image, its version, and the chosen modules in the order they load.

    soft_modules: the guest tries to load these first, and boots without them.
    """

    version: str
    image: bytes
    modules: tuple[str, ...]
    soft_modules: tuple[str, ...] = ()


def take_kernel(
    deb: Path,
    tree: Tree,
    wanted: tuple[str, ...],
    kernel_format: str,
    available: tuple[str, ...] = (),
    barred: tuple[str, ...] = (),
) -> Kernel:
    """Reads a kernel package; puts the wanted and the available modules, and those they depend on, into the tree.

    kernel_format: `vmlinuz` is Debian's boot image as it is, `vmlinux` the ELF file inside it, which starts sooner,
    `auto` the latter where it can be unpacked (see vmkit.image.formats.vmlinux).

    Only the wanted ones are the Kernel's `modules`, which load at boot. A barred one is a file that is not in
    modprobe's lists. A module that is built into this kernel needs nothing. Raises UnknownModuleError for one that does
    not exist.
    """
    images: dict[str, bytes] = {}
    files: dict[str, tuple[str, Node]] = {}
    builtin = b""
    for path, node in read_deb(deb):
        folder, base = posixpath.split(path)
        module = find_module_name(base)
        if folder == "boot" and base.startswith(_BOOT_IMAGES):
            images[base.partition("-")[2]] = node.data
        elif base == "modules.builtin":
            builtin = node.data
        elif module and node.kind is FileKind.FILE:
            files[module] = (path, node)
    if len(images) != 1:
        raise BuildError(f"the package {deb.stem} holds {len(images)} kernels, and vmkit needs one")
    version, image = next(iter(images.items()))
    if kernel_format == "vmlinux":
        image = extract_vmlinux(image)
    elif kernel_format == "auto":
        image = find_vmlinux(image) or image
    modules = ModuleSet(version, files, builtin)
    loaded, soft = modules.choose(wanted)
    modules.choose((*available, *(name for name in OPTIONAL_MODULES if name in files)))
    modules.write(tree, barred)
    return Kernel(version, image, loaded, soft)
