"""Finds a kernel's files in its build tree, or in a folder of modules, and checks that they belong together.

A build tree needs no `make modules_install`: modules.order lists the modules where they were built. A folder of modules
is lib/modules/VERSION, as `make modules_install INSTALL_MOD_PATH=` leaves it. The formats are those of
Documentation/kbuild/kbuild.rst and Documentation/arch/x86/boot.rst.
"""

import errno
import mmap
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vmkit.errors import ConfigError, HostError
from vmkit.image.modules import find_module_name
from vmkit.trees.config import Config, parse_config

# Debian's kernel has 4,300 modules, and a list of 250 KB; allmodconfig has twice as many.
_LIST_LIMIT_BYTES = 16 << 20
_CONFIG_LIMIT_BYTES = 4 << 20
_RELEASE_LIMIT_BYTES = 256
_FILES_LIMIT = 100_000
# A vmlinux with what debuggers read has 1 GB, and its version stands near its beginning.
_KERNEL_LIMIT_BYTES = 2 << 30
_BZIMAGE = Path("arch/x86/boot/bzImage")
# What other architectures have in its place.
_OTHER_IMAGES = ("arch/arm64/boot/Image", "arch/arm/boot/zImage", "arch/riscv/boot/Image", "arch/s390/boot/bzImage")
_MAGIC_AT, _MAGIC, _VERSION_AT, _VERSION_BASE = 0x202, b"HdrS", 0x20E, 0x200
_HEAD_BYTES = 64 << 10
_BANNER = re.compile(rb"Linux version (\d[^ \0]{0,127}) ")
_VERSION = re.compile(r"[0-9][A-Za-z0-9.+~_-]{0,127}")
_BUILD = "make -j$(nproc)"


@dataclass(frozen=True, slots=True)
class KernelFiles:
    """A kernel and its modules.

    origin: the folder that the user named. modules: each module's path below its kernel's folder in a guest and its
    file, by its name. builtin_list: as modules.builtin has it. config: None where it is not known. vmlinux: for gdb.
    """

    origin: Path
    image: Path
    version: str
    modules: dict[str, tuple[str, Path]]
    builtin_list: bytes
    config: Config | None
    vmlinux: Path | None
    # What makes modules that are missing.
    hint: str


def find_tree(folder: Path) -> KernelFiles:
    """The kernel of a build tree, or of the folder of `make O=`. Raises ConfigError, HostError."""
    if not folder.is_dir():
        raise ConfigError(f"there is no kernel tree {folder}", hint="give the folder in which you ran make")
    config = _read_config(folder / ".config")
    if config is None:
        if (folder / "Kconfig").exists():
            raise ConfigError(
                f"the kernel tree {folder} is not configured: it has no .config",
                hint=f"make defconfig kvm_guest.config, then {_BUILD}; with `make O=DIR`, give that DIR",
            )
        raise ConfigError(
            f"{folder} is no kernel tree: it has no .config", hint="give the folder in which you ran make"
        )
    _check_architecture(folder, config)
    release = _read_text(folder / "include/config/kernel.release", _RELEASE_LIMIT_BYTES)
    vmlinux = folder / "vmlinux"
    # QEMU starts a vmlinux sooner: nothing is unpacked in the guest.
    has_pvh = config.has("PVH") and vmlinux.is_file()
    image = vmlinux if has_pvh else folder / _BZIMAGE
    if release is None or not image.is_file():
        raise ConfigError(
            f"the kernel tree {folder} is not built: it has no {_BZIMAGE}", hint=f"in that folder: {_BUILD}"
        )
    version = _check_version(release.strip(), folder / "include/config/kernel.release")
    _require_same(read_version(image), version, image, folder, f"build the rest of the tree, too: {_BUILD}")
    return KernelFiles(
        origin=folder,
        image=image,
        version=version,
        modules=dict(_list_tree(folder)),
        builtin_list=_read_bytes(folder / "modules.builtin", _LIST_LIMIT_BYTES) or b"",
        config=config,
        vmlinux=vmlinux if vmlinux.is_file() else None,
        hint=f"build the modules: {_BUILD} modules",
    )


def find_installed(folder: Path, kernel: Path) -> KernelFiles:
    """The modules in a folder, for a kernel: lib/modules/VERSION itself, or the folder that has lib/modules.

    Raises ConfigError, HostError.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder of modules {folder}", hint="give lib/modules/VERSION")
    version = read_version(kernel)
    found = _find_version_folder(folder, version)
    _check_version(found.name, found)
    _require_same(version, found.name, kernel, found, "give the modules of the same build: make modules_install")
    near = (found / "config", kernel.parent / f"config-{found.name}")
    return KernelFiles(
        origin=folder,
        image=kernel,
        version=found.name,
        modules=dict(_list_installed(found)),
        builtin_list=_read_bytes(found / "modules.builtin", _LIST_LIMIT_BYTES) or b"",
        config=next((config for config in map(_read_config, near) if config is not None), None),
        vmlinux=None,
        hint="install them anew: make modules_install INSTALL_MOD_PATH=DIR",
    )


class NotRegularError(OSError):
    """A FIFO, a device or a folder stands where a file is expected."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, and waits for no other. Raises OSError, NotRegularError for another kind."""
    # The open of a FIFO would wait for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_version(kernel: Path) -> str:
    """The version that `uname -r` prints in it, of a bzImage or a vmlinux; empty where it is not found."""
    try:
        with open_regular(kernel) as file:
            head = file.read(_HEAD_BYTES) or b""
            if head[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC:
                (at,) = struct.unpack_from("<H", head, _VERSION_AT)
                text = head[at + _VERSION_BASE : at + _VERSION_BASE + 128] if at else b""
                return text.partition(b"\0")[0].partition(b" ")[0].decode("latin-1")
            size = min(os.fstat(file.fileno()).st_size, _KERNEL_LIMIT_BYTES)
            with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as data:
                found = _BANNER.search(data)
                return found[1].decode("latin-1") if found else ""
    except NotRegularError as error:
        raise HostError(f"cannot read the kernel {kernel}: it is no regular file") from error
    except OSError as error:
        raise HostError(f"cannot read the kernel {kernel}: {os.strerror(error.errno or 0)}") from error
    except ValueError:
        # An empty file, which cannot be mapped.
        return ""


def _check_architecture(folder: Path, config: Config) -> None:
    other = next((name for name in _OTHER_IMAGES if (folder / name).exists()), "")
    if config.has("X86_64") and not (other and not (folder / _BZIMAGE).exists()):
        return
    name = other.split("/")[1] if other else config.architecture
    what = "32-bit x86" if config.has("X86_32") else name or "another processor"
    raise ConfigError(
        f"the kernel tree {folder} is for {what}", hint="vmkit's machines are x86-64: make x86_64_defconfig"
    )


def _check_version(version: str, path: Path) -> str:
    """The version, if a folder in the guest can have it as its name."""
    if not _VERSION.fullmatch(version):
        raise ConfigError(f"{path} names no version of a kernel: {version!r}", hint="give lib/modules/VERSION")
    return version


def _require_same(version: str, expected: str, kernel: Path, folder: Path, hint: str) -> None:
    if version and version != expected:
        raise ConfigError(
            f"the kernel {kernel} is {version}, and the modules of {folder} are for {expected}", hint=hint
        )


def _find_version_folder(folder: Path, version: str) -> Path:
    """The folder that is named after the kernel."""
    below = next((path for path in (folder / "lib/modules", folder / "usr/lib/modules") if path.is_dir()), None)
    if below is None:
        if not any((folder / name).exists() for name in ("kernel", "modules.order", "modules.dep")):
            raise ConfigError(f"{folder} is no folder of modules", hint="give lib/modules/VERSION")
        return folder.resolve()
    known = sorted(path.name for path in below.iterdir() if path.is_dir())
    if version in known:
        return below / version
    if len(known) == 1:
        return below / known[0]
    raise ConfigError(
        f"{below} has no modules of the kernel {version or '(its version is not known)'}",
        hint=f"it has those of {', '.join(known) or 'no kernel'}",
    )


def _list_tree(folder: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """The modules of modules.order: `kernel/a/b.ko` before Linux 5.3, `a/b.ko` before 6.2, `a/b.o` since."""
    for line in (_read_text(folder / "modules.order", _LIST_LIMIT_BYTES) or "").splitlines():
        path = re.sub(r"\.o$", ".ko", line)
        if path.startswith("kernel/") and not (folder / path).exists():
            path = path.removeprefix("kernel/")
        name = find_module_name(path)
        if name and ".." not in path.split("/") and not path.startswith("/"):
            yield name, (f"kernel/{path}", folder / path)


def _list_installed(folder: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """The modules of modules.dep, or, without it, those that are there."""
    listed = _read_text(folder / "modules.dep", _LIST_LIMIT_BYTES)
    if listed:
        paths = [line.partition(":")[0] for line in listed.splitlines()]
    else:
        paths = [str(path.relative_to(folder)) for path in _walk(folder)]
    for path in paths:
        name = find_module_name(path)
        if name and ".." not in path.split("/") and not path.startswith("/"):
            yield name, (path, folder / path)


def _walk(folder: Path) -> Iterator[Path]:
    count = 0
    # `build` and `source` lead to whole trees.
    for root, _, names in os.walk(folder, followlinks=False):
        for name in names:
            count += 1
            if count > _FILES_LIMIT:
                raise ConfigError(f"{folder} has more than {_FILES_LIMIT} files", hint="give lib/modules/VERSION")
            if ".ko" in name:
                yield Path(root) / name


def _read_config(path: Path) -> Config | None:
    text = _read_text(path, _CONFIG_LIMIT_BYTES)
    return None if text is None else parse_config(text)


def _read_text(path: Path, limit_bytes: int) -> str | None:
    data = _read_bytes(path, limit_bytes)
    return None if data is None else data.decode("utf-8", "replace")


def _read_bytes(path: Path, limit_bytes: int) -> bytes | None:
    """A regular file; None where there is none. Raises HostError."""
    try:
        with open_regular(path) as file:
            # None from a file of /proc that would wait for more.
            data = file.read(limit_bytes + 1) or b""
    except (FileNotFoundError, NotADirectoryError, NotRegularError):
        return None
    except OSError as error:
        raise HostError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
    if len(data) > limit_bytes:
        raise HostError(f"{path} is larger than {limit_bytes >> 10} KiB")
    return data
