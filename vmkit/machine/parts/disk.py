"""A machine's disks: the file of its root, and the files that it has beside.

They are read before QEMU starts, so that the error names the file and the remedy. What QEMU alone can find out (another
machine has the file) is told from its last words.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.errors import ConfigError, HostError
from vmkit.machine.parts.part import Fitting, KnownEnd, Option, OptionKind, Part, render_options
from vmkit.machine.source import ANY, QCOW2, RootDisk, read_head, read_root
from vmkit.machine.spec import MAX_DISKS, MAX_PARTITIONS, DiskMode, DiskSpec, make_disks, read_path

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec, StoredRoot

# By this the guest's init tells the root from other disks. A serial has at most 20 bytes (linux/virtio_blk.h,
# VIRTIO_BLK_ID_BYTES).
ROOT_SERIAL = "vmkit-root"
# QEMU's name for the file below a stored root.
BASE_NODE = "base"
BASE_FILE_NODE = "base-file"
# What the file system of a root is that its user gave: the guest tries no others.
ROOT_ARGUMENT = "vmkit.root="
# The root keeps what the guest writes; and its disk has become larger than its file system.
STORED_ARGUMENT = "vmkit.stored"
GROW_ARGUMENT = "vmkit.grow"
# Makes a guest load the driver of disks; one whose root is a disk has it.
DISKS_ARGUMENT = "vmkit.disks"

_QCOW2_MAGIC = b"QFI\xfb"
_SECTOR_BYTES = 512
# QEMU's words when it does not get its lock on an image (block/file-posix.c).
IN_USE = KnownEnd(
    r"Failed to get .* lock\s+Is another process using the image \[(.*)\]\?",
    "disk-in-use",
    r"the disk \1 is in use by another machine or program",
    "only one machine can have a writable disk: stop the other machine, or use a copy",
)


class DiskPart(Part):
    """The root's disk, and `disks`."""

    name = "disk"
    options = (
        Option(
            "root",
            OptionKind.PATH,
            flag="--root",
            metavar="FILE",
            help="Boot this file system, read-only, as the root of a disk image or of the image any.",
            read=read_path,
            is_python=True,
        ),
        Option(
            "partition",
            OptionKind.INTEGER,
            flag="--partition",
            metavar="NUMBER",
            help="Which partition of the root's disk is the root [default: the only one that can be].",
            is_python=True,
        ),
        Option(
            "disks",
            OptionKind.PATHS,
            (),
            flag="--disk",
            metavar="FILE",
            help="Attach this file or block device as a disk, read-only (repeatable).",
            read=lambda paths: make_disks(paths, ()),
            is_python=True,
        ),
        Option(
            "rwdisks",
            OptionKind.PATHS,
            (),
            flag="--rwdisk",
            metavar="FILE",
            help="Attach this file or block device as a writable disk (repeatable).",
            field="disks",
            read=lambda paths: make_disks((), paths),
            is_python=True,
        ),
    )

    def check(self, spec: "MachineSpec") -> None:
        if len(spec.disks) > MAX_DISKS:
            raise ConfigError(f"a machine can have {MAX_DISKS} disks, not {len(spec.disks)}")
        if spec.partition is not None and spec.root is None:
            raise ConfigError("--partition needs a disk of yours as the root", hint="give it: vmkit up PATH")
        if spec.partition is not None and not 0 < spec.partition <= MAX_PARTITIONS:
            raise ConfigError(f"--partition must be between 1 and {MAX_PARTITIONS}, not {spec.partition}")

    def check_host(self, spec: "MachineSpec") -> None:
        for disk in spec.disks:
            check_disk(disk)
        _check_once(spec.disks)
        # A stored root was looked at when it was found.
        if spec.root is not None and spec.stored is None:
            check_root(spec.root, spec.partition)

    def check_image(self, spec: "MachineSpec", built: "BuiltImage") -> None:
        if built.takes_root:
            _check_given(spec, built)
        elif spec.root is None:
            return
        elif built.root is None:
            raise ConfigError(
                f"the image {built.name} has its root in memory, and no disk that {spec.root} can replace",
                hint="give it as a disk beside (--disk), or use an image with a disk root, such as debian",
            )
        elif read_root(spec.root, spec.partition) != RootDisk("ext4"):
            raise ConfigError(
                f"the image {built.name} needs an ext4 without partitions as its root, and {spec.root} is another disk",
                hint=f"the image {ANY} takes others, too: vmkit up {spec.root}",
            )

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        return {"disks": [{"path": str(disk.path), "mode": disk.mode.value} for disk in spec.disks]}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        """The disks in the order of their names in the guest: /dev/vda is the root, where there is one."""
        stored = hardware.spec.stored
        mode = DiskMode.READ_ONLY if stored is None else DiskMode.READ_WRITE
        root = () if hardware.root is None else ((ROOT_SERIAL, DiskSpec(hardware.root, mode)),)
        beside = ((f"vmkit-{i}", disk) for i, disk in enumerate(hardware.spec.disks))
        words: list[str] = [] if stored is None else list(_plan_base(stored))
        for number, (serial, disk) in enumerate((*root, *beside)):
            blockdev = {
                # Never guessed from the content: a guest that writes a header to its raw disk could name any file of
                # ours.
                "driver": "qcow2" if disk.path.suffix == QCOW2 else "raw",
                "node-name": f"disk{number}",
                "read-only": "on" if disk.mode is DiskMode.READ_ONLY else "off",
                "file.driver": "file",
                "file.filename": str(disk.path),
            }
            if serial == ROOT_SERIAL and stored is not None:
                # What the guest gives free, the host gets back.
                blockdev |= {"backing": BASE_NODE, "discard": "unmap", "file.discard": "unmap"}
            words += ["-blockdev", render_options(blockdev)]
            words += ["-device", f"virtio-blk-pci,drive=disk{number},serial={serial}"]
        return tuple(words)

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        words = [f"{ROOT_ARGUMENT}{hardware.root_type}"] if hardware.root_type else []
        stored = hardware.spec.stored
        if stored is not None:
            words += [STORED_ARGUMENT, GROW_ARGUMENT] if stored.grows else [STORED_ARGUMENT]
        return (*words, DISKS_ARGUMENT) if hardware.spec.disks else tuple(words)

    def plan_fitting(self, hardware: "Hardware") -> Fitting | None:
        return Fitting(self.name, ends=(IN_USE,)) if hardware.root is not None or hardware.spec.disks else None


def _plan_base(stored: "StoredRoot") -> tuple[str, ...]:
    """The file below a stored disk. QEMU is told which it is, and opens no backing file that a disk names.

    A qcow2 that names one is refused when the machine is made, and its header could be another by now.
    """
    if stored.base_format == "qcow2":
        file = {"driver": "file", "node-name": BASE_FILE_NODE, "read-only": "on", "filename": str(stored.base)}
        # Only JSON has null, which is QEMU's word for no backing file.
        base = {"driver": "qcow2", "node-name": BASE_NODE, "read-only": True, "file": BASE_FILE_NODE, "backing": None}
        return ("-blockdev", render_options(file), "-blockdev", json.dumps(base))
    blockdev = {
        "driver": stored.base_format,
        "node-name": BASE_NODE,
        "read-only": "on",
        "file.driver": "file",
        "file.filename": str(stored.base),
    }
    return ("-blockdev", render_options(blockdev))


def _check_given(spec: "MachineSpec", built: "BuiltImage") -> None:
    """The root of an image that has none of its own. Raises ConfigError."""
    if spec.root_from is not None:
        return
    if spec.root is None and spec.source:
        raise ConfigError(
            f"vmkit makes a disk of {spec.source} when it starts the machine, and not before",
            hint="vmkit up starts it; anything else needs the disk itself: --root FILE",
        )
    if spec.root is None:
        raise ConfigError(
            f"the image {built.name} has no root of its own", hint="give it one: vmkit up PATH, or --root PATH"
        )


def check_disk(disk: DiskSpec) -> None:
    """Raises HostError for what QEMU could not take as a disk."""
    _check_name(disk.path, _read_disk(disk.path, "the disk", write=disk.mode is DiskMode.READ_WRITE))


def _check_once(disks: tuple[DiskSpec, ...]) -> None:
    """Raises ConfigError for one file as two disks, one of them writable: QEMU's locks would refuse the second."""
    for number, disk in enumerate(disks):
        for other in disks[:number]:
            if DiskMode.READ_WRITE in (disk.mode, other.mode) and disk.path.samefile(other.path):
                raise ConfigError(
                    f"two disks are the same file, and the guest can write to it: {disk.path}",
                    hint="give it once, as --rwdisk or as --disk",
                )


def check_root(root: Path, partition: int | None = None) -> None:
    """Raises HostError, ConfigError, BuildError for what no guest could mount as its root."""
    _check_name(root, _read_disk(root, "the root", write=False))
    read_root(root, partition)


def _check_name(path: Path, head: bytes) -> None:
    is_named_qcow2, is_qcow2 = path.suffix == QCOW2, head.startswith(_QCOW2_MAGIC)
    if is_qcow2 != is_named_qcow2:
        seen = (
            "is a qcow2 image, and its name does not end in .qcow2"
            if is_qcow2
            else "is named .qcow2, but is not a qcow2 image"
        )
        raise HostError(f"the disk {path} {seen}", hint="rename it: a disk is raw, unless its name ends in .qcow2")


def _read_disk(path: Path, what: str, *, write: bool) -> bytes:
    """The first bytes of what QEMU can take as a disk. Raises HostError."""
    head = read_head(path, what, write=write)
    if len(head) < _SECTOR_BYTES:
        raise HostError(f"cannot use {what} {path}: it is smaller than one sector of {_SECTOR_BYTES} bytes")
    return head
