"""What a kernel's .config says, and the options that a machine needs there, each with the lines that add it. Pure.

The names are those of the kernel's Kconfig files. A line of a .config is `CONFIG_NAME=value`, or a comment.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

_LINE = re.compile(r"^CONFIG_([A-Za-z0-9_]+)=(.*)$", re.MULTILINE)
# `# Linux/arm64 6.12.0 Kernel Configuration`, in the first lines.
_ARCHITECTURE = re.compile(r"^# Linux/(\w+) ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Config:
    """The options of a kernel that are on, `y`, `m` or a value, and the architecture that its comment names."""

    values: Mapping[str, str]
    architecture: str

    def has(self, name: str) -> bool:
        """Whether the kernel has the option, built in or as a module."""
        return self.values.get(name, "n") != "n"


@dataclass(frozen=True, slots=True)
class Need:
    """One option. module: its module's name, where it can be one. within: options without which it is not offered."""

    option: str
    module: str = ""
    within: tuple[str, ...] = ()


# What /init, Python and vshd are started with, and what they use at once.
_BASE = (
    *(Need(name) for name in ("64BIT", "PCI", "ACPI", "BLK_DEV_INITRD", "BINFMT_ELF", "BINFMT_SCRIPT", "MULTIUSER")),
    *(Need(name) for name in ("PROC_FS", "SYSFS", "DEVTMPFS", "SHMEM", "TMPFS", "TTY", "UNIX98_PTYS")),
    *(Need(name) for name in ("FUTEX", "EPOLL", "SIGNALFD", "TIMERFD", "EVENTFD", "POSIX_TIMERS", "NET", "UNIX")),
    Need("SERIAL_8250_CONSOLE", within=("SERIAL_8250",)),
    Need("VIRTIO_PCI", "virtio_pci", ("VIRTIO_MENU",)),
    Need("VSOCKETS", "vsock"),
    Need("VIRTIO_VSOCKETS", "vmw_vsock_virtio_transport"),
)
_TOKEN = (Need("DMI"),)
_DISK = (Need("VIRTIO_BLK", "virtio_blk", ("BLOCK", "BLK_DEV")),)
_OVERLAY = (Need("OVERLAY_FS", "overlay"),)
_FILE_SYSTEMS = {
    "ext4": (Need("EXT4_FS", "ext4", ("BLOCK",)),),
    "squashfs": (Need("SQUASHFS", "squashfs", ("BLOCK", "MISC_FILESYSTEMS")),),
    "erofs": (Need("EROFS_FS", "erofs", ("BLOCK", "MISC_FILESYSTEMS")),),
    "xfs": (Need("XFS_FS", "xfs", ("BLOCK",)),),
    "btrfs": (Need("BTRFS_FS", "btrfs", ("BLOCK",)),),
}
# The two ways to a folder of the host, the better one first.
NINE_P, VIRTIOFS = "9p", "virtiofs"
_SHARES = {
    NINE_P: (
        Need("NET_9P", "9pnet"),
        Need("NET_9P_VIRTIO", "9pnet_virtio"),
        Need("9P_FS", "9p", ("INET", "NETWORK_FILESYSTEMS")),
    ),
    VIRTIOFS: (Need("VIRTIO_FS", "virtiofs", ("FUSE_FS",)),),
}
_EVERY_ROOT = _FILE_SYSTEMS | _SHARES


def parse_config(text: str) -> Config:
    """The options of a .config."""
    architecture = _ARCHITECTURE.search(text[:1000])
    return Config(dict(_LINE.findall(text)), architecture[1] if architecture else "")


def find_needs(*, root: str = "", has_disks: bool = False, has_token: bool = False) -> tuple[Need, ...]:
    """What a machine needs. root: the type of its root's file system; "": it is in memory. has_token: it has the token
    of the backend vhost, which comes in the firmware's tables.
    """
    needs = list(_BASE)
    if root:
        needs += _OVERLAY
    if root in _FILE_SYSTEMS or has_disks:
        needs += _DISK
    needs += _EVERY_ROOT.get(root, ())
    if has_token:
        needs += _TOKEN
    return tuple(needs)


def find_missing(needs: tuple[Need, ...], config: Config) -> list[str]:
    """The lines that add to a .config what is missing there, those of an option's parents before its own."""
    lines = []
    for need in needs:
        if not _serves(need, config):
            parents = [name for name in need.within if config.values.get(name) != "y"]
            lines += [f"CONFIG_{name}=y" for name in (*parents, need.option)]
    return list(dict.fromkeys(lines))


def _serves(need: Need, config: Config) -> bool:
    """An option that can be no module here has to be built in: nothing loads it before it is used."""
    return config.has(need.option) if need.module else config.values.get(need.option) == "y"


def find_modules(needs: tuple[Need, ...], config: Config | None) -> tuple[str, ...]:
    """The modules that the needs are, for a kernel that does not have them built in."""
    named = [need for need in needs if need.module]
    return tuple(need.module for need in named if config is None or config.values.get(need.option) == "m")


def find_builtin(needs: tuple[Need, ...], config: Config) -> Iterator[str]:
    """The modules of the needs that are built into the kernel."""
    return (need.module for need in needs if need.module and config.values.get(need.option) == "y")


def find_options(modules: Container[str]) -> list[str]:
    """The lines that add these modules, where they are of a need."""
    every = (*_BASE, *_DISK, *_OVERLAY, *(need for needs in _EVERY_ROOT.values() for need in needs))
    return [f"CONFIG_{need.option}=y" for need in every if need.module and need.module in modules]
