"""The kernel modules of an image: the files they need, the order in which they load, and the lists for modprobe.

A module names what it needs in its .modinfo section: `depends` are modules without which it does not load, `softdep`
are modules or aliases that it asks the kernel for at work (MODULE_SOFTDEP in linux/module.h; ext4 asks for
`crypto-crc32c`). Modules are stored uncompressed: the guest's processor is the slow one. Pure.
"""

import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vmkit.errors import BuildError
from vmkit.image.formats.elf import drop_debug, read_modinfo
from vmkit.image.formats.packed import unpack_gzip, unpack_xz, unpack_zstd
from vmkit.image.formats.tree import Node, Tree, file_node

# Of every image whose kernel has them: what /init loads where the machine has the devices of `vmkit up --vmcore`.
OPTIONAL_MODULES = ("pvpanic_pci", "qemu_fw_cfg")
# The largest of Debian's, amdgpu, is 25 MB; with what debuggers read, as in a build tree, some have 200.
_MODULE_LIMIT_BYTES = 512 << 20
_UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    ".ko": lambda data, _limit_bytes: data,
    ".ko.xz": unpack_xz,
    ".ko.gz": unpack_gzip,
    ".ko.zst": unpack_zstd,
}
# Soft dependencies that are aliases and not modules are ciphers and checksums. A kernel's modules take 20 s to unpack
# altogether, those of these folders a third of a second.
_CIPHERS = ("/kernel/crypto/", "/crypto/")
# Real modules depend on each other a few deep.
_DEPTH_LIMIT = 64
_SOFT_ORDERS = ("pre:", "post:")
# A cipher's alias in the modules that have it (MODULE_ALIAS_CRYPTO), and a platform driver's name.
_ALIAS_PREFIXES = ("crypto-", "platform:")


def find_module_name(path: str) -> str:
    """The module's name of a path in a kernel package, empty for another file."""
    stem, dot, extension = posixpath.basename(path).partition(".ko")
    return stem.replace("-", "_") if dot + extension in _UNPACKERS else ""


class UnknownModuleError(BuildError):
    """The kernel lacks a module. `wanted` is the one that was to be chosen: that module, or one that depends on it."""

    def __init__(self, brief: str, wanted: str) -> None:
        super().__init__(brief)
        self.wanted = wanted


@dataclass(frozen=True, slots=True)
class _Module:
    """One chosen module. path is that in the guest; needed are the modules it does not load without."""

    path: str
    data: bytes
    needed: tuple[str, ...]
    soft: tuple[str, ...]


class ModuleSet:
    """Chosen modules of one kernel, in load order: a module stands after everything it needs."""

    def __init__(self, version: str, files: Mapping[str, tuple[str, Node]], builtin_list: bytes) -> None:
        """files: each module's path and file, by its name. builtin_list: the kernel's modules.builtin."""
        self._version = version
        self._root = f"usr/lib/modules/{version}"
        self._files = files
        self._builtin_list = builtin_list
        self._builtin = set(map(find_module_name, builtin_list.decode(errors="replace").splitlines()))
        self._chosen: dict[str, _Module] = {}
        # Modules whose dependencies are being added.
        self._open: set[str] = set()
        # An alias that a chosen module asks for, and the chosen modules that have it.
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._ciphers: dict[str, tuple[str, ...]] | None = None

    def choose(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Adds modules and all they depend on. Returns what must load, in order, and what to try before that.

        The second are the soft dependencies: a guest's processor or hardware may lack what they are for. A module that
        is built into the kernel needs nothing. Raises UnknownModuleError for one that does not exist.
        """
        before = set(self._chosen)
        for name in names:
            self._add(name, name)
        loaded = tuple(name for name in self._chosen if name not in before)
        soft: list[str] = []
        for name in loaded:
            soft += self._add_soft(name)
        return loaded, tuple(name for name in dict.fromkeys(soft) if name not in loaded)

    def write(self, tree: Tree, barred: tuple[str, ...]) -> None:
        """Puts the modules into the tree, and the lists by which modprobe finds them.

        A barred module has no line there: busybox's modprobe has no other way to refuse a module. Of a
        module that is built in, modprobe finds that it has nothing to do.
        """
        tree.add(f"{self._root}/modules.builtin", file_node(self._builtin_list))
        for module in self._chosen.values():
            tree.add(module.path, file_node(module.data))
        known = [name for name in self._chosen if name not in barred]
        dependencies = "".join(self._render_dependencies(name) for name in known)
        tree.add(f"{self._root}/modules.dep", file_node(dependencies.encode()))
        aliases = [
            f"alias {alias} {name}\n"
            for alias, names in sorted(self._aliases.items())
            for name in names
            if name in known and name != alias.replace("-", "_")
        ]
        if aliases:
            # The kernel itself asks for these, by running /sbin/modprobe.
            tree.add(f"{self._root}/modules.alias", file_node("".join(aliases).encode()))

    def _add(self, name: str, wanted: str, needed_by: str = "") -> None:
        """wanted: the module for whose sake this is one."""
        if name in self._chosen or name in self._builtin:
            return
        if name not in self._files:
            reason = f", which {needed_by} depends on" if needed_by else ""
            raise UnknownModuleError(f"the kernel {self._version} has no module '{name}'{reason}", wanted)
        if name in self._open:
            raise BuildError(f"the module {name} of the kernel {self._version} depends on itself")
        if len(self._open) >= _DEPTH_LIMIT:
            raise BuildError(
                f"the module {wanted} of the kernel {self._version} depends on others more than {_DEPTH_LIMIT} deep"
            )
        path, node = self._files[name]
        data = drop_debug(_unpack(path, node))
        info = read_modinfo(data)
        depends = [word.replace("-", "_") for line in info.get("depends", ()) for word in line.split(",") if word]
        self._open.add(name)
        for dependency in depends:
            self._add(dependency, wanted, name)
        self._open.remove(name)
        plain = path[: path.rindex(".ko")] + ".ko"
        needed = tuple(word for word in depends if word in self._chosen)
        soft = tuple(word for line in info.get("softdep", ()) for word in line.split() if word not in _SOFT_ORDERS)
        self._chosen[name] = _Module(plain, data, needed, soft)

    def _add_soft(self, name: str, depth: int = 0) -> list[str]:
        """Adds the soft dependencies of a chosen module, and theirs. Those that this kernel lacks are left out."""
        if depth >= _DEPTH_LIMIT:
            raise BuildError(
                f"the module {name} of the kernel {self._version} is a soft dependency more than {_DEPTH_LIMIT} deep"
            )
        added = []
        for word in self._chosen[name].soft:
            for found in self._find_soft(word):
                if found not in self._chosen:
                    self._add(found, name)
                    added += self._add_soft(found, depth + 1)
                added.append(found)
        return added

    def _find_soft(self, word: str) -> tuple[str, ...]:
        """The modules that a soft dependency means; none where it is built in, or is of another kernel."""
        for prefix in ("", *_ALIAS_PREFIXES):
            name = word.removeprefix(prefix).replace("-", "_")
            if name in self._builtin:
                return ()
            if name in self._files:
                self._aliases[word] = (name,)
                return (name,)
        if self._ciphers is None:
            self._ciphers = dict(self._read_ciphers())
        found = tuple(sorted(name for name, aliases in self._ciphers.items() if word in aliases))
        self._aliases[word] = found
        return found

    def _read_ciphers(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, (path, node) in self._files.items():
            if any(folder in path for folder in _CIPHERS):
                yield name, read_modinfo(_unpack(path, node)).get("alias", ())

    def _render_dependencies(self, name: str) -> str:
        """A line of modules.dep. modprobe, busybox's and kmod's, loads it from right to left (depmod(8)).

        So what the module itself needs comes first, and what all others need comes last.
        """
        needed = self._find_needed(name)
        words = [self._strip(other) for other in reversed(self._chosen) if other in needed]
        return f"{self._strip(name)}: {' '.join(words)}".rstrip() + "\n"

    def _find_needed(self, name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            more = set(self._chosen[waiting.pop()].needed) - found
            found |= more
            waiting += more
        return found

    def _strip(self, name: str) -> str:
        return self._chosen[name].path.removeprefix(self._root + "/")


def _unpack(path: str, node: Node) -> bytes:
    data = b"".join(node.chunks())
    extension = path[path.rindex(".ko") :]
    try:
        return _UNPACKERS[extension](data, _MODULE_LIMIT_BYTES)
    except BuildError as error:
        raise BuildError(f"cannot decompress the kernel module {path}: {error.brief}") from error
