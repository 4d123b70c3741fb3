"""A Debian kernel package into a boot image and the few modules an image lists, with what modprobe needs to load them.

Knows how Debian packs kernels (boot/vmlinuz-VERSION, modules perhaps compressed). Modules are stored uncompressed: the
guest's processor is the slow one. Which modules an image wants is the recipe's business.
"""

import gzip
import lzma
import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError, CommandError
from vmkit.image.debian.deb import read_deb
from vmkit.image.formats.elf import read_modinfo
from vmkit.image.formats.tree import Kind, Node, Tree, file_node
from vmkit.image.formats.vmlinux import extract_vmlinux, find_vmlinux, unpack_zstd

_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": lambda data: data,
    ".ko.xz": lzma.decompress,
    ".ko.gz": gzip.decompress,
    ".ko.zst": unpack_zstd,
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel's boot image, its version, and the chosen modules in the order they load."""

    version: str
    image: bytes
    modules: tuple[str, ...]


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
    `auto` the latter where it can be had (see vmkit.image.formats.vmlinux).

    Only the wanted ones are the Kernel's `modules`, which load at boot. A barred one is a file that modprobe is not
    told of. A module that is built into this kernel needs nothing. Raises BuildError naming one that does not exist.
    """
    images: dict[str, bytes] = {}
    files: dict[str, tuple[str, Node]] = {}
    builtin: set[str] = set()
    for path, node in read_deb(deb):
        folder, base = posixpath.split(path)
        stem, dot, extension = base.partition(".ko")
        if folder == "boot" and base.startswith("vmlinuz-"):
            images[base.removeprefix("vmlinuz-")] = node.data
        elif base == "modules.builtin":
            builtin = {_module_name(line) for line in node.data.decode().splitlines()}
        elif dot and node.kind is Kind.FILE and dot + extension in _DECOMPRESSORS:
            files[stem.replace("-", "_")] = (path, node)
    if len(images) != 1:
        raise BuildError(f"the package {deb.stem} holds {len(images)} kernels, and one is needed")
    version, image = next(iter(images.items()))
    if kernel_format == "vmlinux":
        image = extract_vmlinux(image)
    elif kernel_format == "auto":
        image = find_vmlinux(image) or image
    modules = _ModuleSet(version, files, builtin)
    for name in wanted:
        modules.want(name)
    loaded = tuple(modules.ordered)
    for name in available:
        modules.want(name)
    modules.write(tree, barred)
    return Kernel(version, image, loaded)


def _module_name(path: str) -> str:
    return posixpath.basename(path).partition(".ko")[0].replace("-", "_")


class _ModuleSet:
    """Modules and what they depend on, in load order: a module stands after everything it needs."""

    def __init__(self, version: str, files: dict[str, tuple[str, Node]], builtin: set[str]) -> None:
        self._version = version
        self._files = files
        self._builtin = builtin
        self.ordered: dict[str, tuple[str, bytes, tuple[str, ...]]] = {}

    def want(self, name: str, wanted_by: str = "") -> None:
        if name in self.ordered or name in self._builtin:
            return
        if name not in self._files:
            reason = f", which {wanted_by} depends on" if wanted_by else ""
            raise BuildError(
                f"the kernel {self._version} has no module '{name}'{reason}", hint="see the recipe's `modules`"
            )
        path, node = self._files[name]
        data = _decompress(path, node.data)
        depends = tuple(word.replace("-", "_") for word in read_modinfo(data).get("depends", "").split(",") if word)
        for dependency in depends:
            self.want(dependency, name)
        plain = path[: path.rindex(".ko")] + ".ko"
        self.ordered[name] = (plain, data, tuple(word for word in depends if word in self.ordered))

    def write(self, tree: Tree, barred: tuple[str, ...]) -> None:
        """The modules, and the modules.dep that modprobe reads: `path: needed paths`, nearest first (depmod(8)).

        A barred module has no line there: busybox's modprobe knows no other way to be told that it must not.
        """
        root = f"usr/lib/modules/{self._version}"
        lines = []
        for plain, data, _ in self.ordered.values():
            tree.add(plain, file_node(data))
        for name, (plain, _, _) in self.ordered.items():
            if name in barred:
                continue
            needed = [self.ordered[other][0].removeprefix(root + "/") for other in self._closure(name)]
            lines.append(f"{plain.removeprefix(root + '/')}: {' '.join(needed)}".rstrip() + "\n")
        tree.add(f"{root}/modules.dep", file_node("".join(lines).encode()))

    def _closure(self, name: str) -> list[str]:
        found: list[str] = []
        for other in self.ordered[name][2]:
            found += [entry for entry in (other, *self._closure(other)) if entry not in found]
        return found


def _decompress(path: str, data: bytes) -> bytes:
    extension = path[path.rindex(".ko") :]
    try:
        return _DECOMPRESSORS[extension](data)
    except (lzma.LZMAError, OSError, EOFError, CommandError) as error:
        raise BuildError(f"the kernel module {path} cannot be decompressed: {error}") from error
