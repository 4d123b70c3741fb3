"""Gives an image's initramfs the modules of another kernel: a second archive behind the first.

The kernel unpacks one archive after the other (Documentation/driver-api/early-userspace/buffer-format.rst), so nothing
of the image is read or packed again. The result is in the cache by its content.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmkit.errors import BuildError, ConfigError
from vmkit.image.cache import find_cache_dir, open_cache
from vmkit.image.formats.cpio import render_cpio
from vmkit.image.formats.tree import FileKind, Node, Tree, file_node
from vmkit.image.modules import OPTIONAL_MODULES, ModuleSet, UnknownModuleError, find_module_name
from vmkit.trees.config import Need, find_builtin, find_missing, find_modules, find_needs, find_options
from vmkit.trees.files import KernelFiles, open_regular

# With what debuggers read, the largest modules of a tree have 100 MB.
_MODULE_LIMIT_BYTES = 512 << 20
_CHUNK_BYTES = 1 << 20
# vmkit's wall keeps it out of every guest.
_BARRED = ("vsock_loopback",)
# What the initramfs of a disk loads before the root is there, which has modules of another kernel.
LIST_PATH = "etc/vmkit/modules"


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A module's content, read when it is chosen."""

    path: Path
    hint: str

    @property
    def size_bytes(self) -> int:
        """Its size on the disk."""
        return self.path.stat().st_size

    def chunks(self) -> Iterator[bytes]:
        """Its content. Raises BuildError."""
        try:
            with open_regular(self.path) as file:
                # Some files have more than their size says, such as those below /proc and those that grow.
                left_bytes = _MODULE_LIMIT_BYTES
                while chunk := file.read(_CHUNK_BYTES):
                    left_bytes -= len(chunk)
                    if left_bytes < 0:
                        raise BuildError(f"the module {self.path} is larger than {_MODULE_LIMIT_BYTES >> 20} MiB")
                    yield chunk
        except OSError as error:
            raise BuildError(f"cannot read the module {self.path}: {error.strerror}", hint=self.hint) from error


def check_kernel_config(files: KernelFiles, needs: tuple[Need, ...]) -> None:
    """Raises ConfigError, with the lines to add, for a kernel that cannot boot such a machine."""
    if files.config is None:
        return
    lines = find_missing(needs, files.config)
    if lines:
        names = ", ".join(line.removesuffix("=y") for line in lines)
        raise ConfigError(
            f"the kernel of {files.origin} lacks what the machine needs: {names}",
            details="\n".join(lines),
            hint="add these lines to its .config, then: make olddefconfig && make -j$(nproc)",
        )


def has_root(files: KernelFiles, kind: str) -> bool:
    """Whether a kernel can mount a root of this type, built in or by a module that is there."""
    # What every machine needs is told apart from that.
    needs = find_needs(root=kind)[len(find_needs()) :]
    if files.config is not None and find_missing(needs, files.config):
        return False
    builtin = set(map(find_module_name, files.builtin_list.decode(errors="replace").splitlines()))
    return all(name in files.modules or name in builtin for name in find_modules(needs, files.config))


def plan_modules(
    files: KernelFiles, needs: tuple[Need, ...], wanted: tuple[str, ...], available: tuple[str, ...] = ()
) -> bytes:
    """An archive with modules and what they depend on. wanted, available: those of the image, which a kernel may lack.

    Raises ConfigError for a needed module that is not there, BuildError for one that cannot be read.
    """
    builtin = files.builtin_list
    if files.config is not None:
        builtin += b"".join(f"kernel/{name}.ko\n".encode() for name in find_builtin(needs, files.config))
    root = f"usr/lib/modules/{files.version}"
    nodes = {
        name: (f"{root}/{path}", Node(FileKind.FILE, 0o644, content=ModuleFile(host, files.hint)))
        for name, (path, host) in files.modules.items()
    }
    modules = ModuleSet(files.version, nodes, builtin)
    loaded, soft = _choose(modules, files, tuple(dict.fromkeys((*find_modules(needs, files.config), *wanted))))
    # What a guest could load is not missed where it is not built.
    available = (*available, *OPTIONAL_MODULES)
    modules.choose(tuple(name for name in available if name in nodes and files.modules[name][1].is_file()))
    tree = Tree()
    modules.write(tree, _BARRED)
    tree.add(LIST_PATH, file_node(f"{' '.join((*soft, *loaded))}\n".encode()))
    return render_cpio(tree)


def _choose(modules: ModuleSet, files: KernelFiles, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    try:
        return modules.choose(names)
    except UnknownModuleError as error:
        lines = find_options((error.wanted,))
        if not lines:
            hint = f"{files.hint}; or leave {error.wanted} out of the image's recipe"
        elif files.config is None:
            hint = "build the kernel with these lines in its .config"
        else:
            lines, hint = [], files.hint
        raise ConfigError(f"{error.brief}: {files.origin}", details="\n".join(lines), hint=hint) from error


def extend_initrd(initrd: Path, image_digest: str, archive: bytes, read_needed: Callable[[], str] = lambda: "") -> Path:
    """The initramfs of an image with the archive behind it, from the cache or written now.

    read_needed: gives a text with the keys of those that running machines have. Raises BuildError, HostError.
    """
    key = hashlib.sha256(image_digest.encode() + b"\0" + archive).hexdigest()
    with open_cache(find_cache_dir()) as cache:
        folder = cache.initrd_dir(key)
        final = folder / "initrd"
        with cache.locked("initrd"):
            if final.is_file():
                # Cache.sweep goes by the folder's time.
                os.utime(folder)
                return final
            cache.sweep()
            with cache.temporary_dir() as temporary:
                made = temporary / "initrd"
                made.mkdir()
                with initrd.open("rb") as source, (made / "initrd").open("wb") as target:
                    shutil.copyfileobj(source, target)
                    # An archive begins at a multiple of four bytes.
                    target.write(bytes(-target.tell() % 4) + archive)
                if folder.exists():
                    cache.discard(folder)
                cache.adopt(made, folder)
            cache.limit_initrds(needed=read_needed())
        return final
