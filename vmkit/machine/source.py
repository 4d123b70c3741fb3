"""What a user names in the place of an image: a disk, or what becomes one, as the root of the image `any`.

vmkit.roots knows file systems, partition tables and qcow2. Here is what the guest must be told of a disk.
"""

import json
import os
import re
import stat
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmkit.errors import ConfigError, HostError
from vmkit.machine.spec import MAX_NAME_CHARACTERS, MachineSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmkit.roots.extents import HostFile
    from vmkit.roots.settings import ContainerSettings
    from vmkit.roots.superblocks import Reader

# Its guest takes any root (images/any.toml).
ANY = "any"
HEAD_BYTES = 2048
# A record has 64 KiB in all (vsh.registry).
MAX_SETTINGS_BYTES = 32 << 10
QCOW2 = ".qcow2"


@dataclass(frozen=True, slots=True)
class RootDisk:
    """What is in a disk: the type of the root's file system, as mount(8) has it, and its partition, if it is in one."""

    type: str
    partition: int | None = None

    def render(self) -> str:
        """As the guest is told: `ext4`, or `ext4:2`."""
        return self.type if self.partition is None else f"{self.type}:{self.partition}"


@dataclass(frozen=True, slots=True)
class NamedRoot:
    """What a user named in the place of an image. disk: where it is one; None: a disk is made of it."""

    text: str
    disk: Path | None = None


def find_source(image: str) -> NamedRoot | None:
    """What stands for an image; None for an image's name or a recipe's path.

    Raises ConfigError for what can be neither a root nor a recipe, HostError for what cannot be read.
    """
    if image.endswith(".toml") or not ("/" in image or ":" in image or image == "-"):
        return None
    # Most machines are of an image.
    from vmkit.roots.source import HEAD_BYTES, Shape, SourceKind, parse_source, recognise  # noqa: PLC0415

    parsed = parse_source(image)
    if parsed.kind is not SourceKind.PATH or parsed.path is None:
        return NamedRoot(image)
    path = parsed.path.expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"there is no root or recipe {path}", hint="`vmkit images` lists the shipped images")
    if path.is_dir():
        return NamedRoot(str(path))
    head = read_head(path, "the root", size=HEAD_BYTES)
    # A recipe is text, and the beginning of no root is.
    if head and b"\0" not in head:
        return None
    is_disk = recognise(head, str(path)) in (Shape.DISK, Shape.QCOW2)
    return NamedRoot(str(path), path if is_disk else None)


def take_source(spec: MachineSpec, tell: "Callable[[str, float | None], None]") -> MachineSpec:
    """The spec with a disk of what its user named as its root: packed now, or found in the cache; and with what a
    container image says of its program. A spec that has its disk is returned as it is.

    Raises ConfigError, BuildError, HostError.
    """
    if not spec.source or spec.root is not None:
        return spec
    from vmkit.roots.prepare import prepare_root  # noqa: PLC0415

    prepared = prepare_root(spec.source, progress=tell, architecture=spec.architecture)
    return replace(spec, root=prepared.path, container=adapt_settings(prepared.settings, spec.source))


def adapt_settings(settings: "ContainerSettings", name: str) -> "ContainerSettings | None":
    """What an image says of its program, as sessions take it; None where it says nothing. Raises ConfigError."""
    if settings.is_empty:
        return None
    # An image's paths begin at its root, also where it does not write so.
    settings = replace(settings, working_dir=f"/{settings.working_dir.lstrip('/')}")
    return check_settings(settings, name)


def check_settings(settings: "ContainerSettings", name: str) -> "ContainerSettings":
    """The settings, if a machine's record can hold them. name: whose. Raises ConfigError."""
    size = len(json.dumps(asdict(settings)))
    if size > MAX_SETTINGS_BYTES:
        raise ConfigError(
            f"the variables and the command of {name} take {size} bytes, more than {MAX_SETTINGS_BYTES}",
            hint="copy long texts into the machine as a file: vmkit cp",
        )
    return settings


def read_root(root: Path, partition: int | None) -> RootDisk:
    """What is in a disk that is to be a root. partition: the one that the user chose.

    Raises ConfigError where there is no root or more than one, BuildError for a broken disk, HostError for one that
    cannot be read.
    """
    # Most machines have no such disk.
    from vmkit.roots.disk import choose_root  # noqa: PLC0415
    from vmkit.roots.extents import HostFile  # noqa: PLC0415

    read_head(root, "the root")
    with closing(HostFile(root)) as file:
        read, size_bytes = _open_content(file, root)
        try:
            found = choose_root(read, size_bytes, str(root), partition)
        except ConfigError as error:
            hint = _HINT if error.hint.startswith("give a ") else error.hint
            raise ConfigError(error.brief, details=error.details, hint=hint) from error
    return RootDisk(found.file_system.kind.value, None if found.partition is None else found.partition.number)


def read_root_of(spec: MachineSpec) -> RootDisk:
    """What is in the disk of a spec's root. Raises as read_root() does."""
    assert spec.root is not None, "its part has looked"
    if spec.stored is None:
        return read_root(spec.root, spec.partition)
    # Its guest may have written to it by now. What it was created with holds.
    kind, _, number = spec.stored.root.partition(":")
    return RootDisk(kind, int(number) if number else None)


_HINT = "a root is a disk with ext4, squashfs, erofs, xfs or btrfs, with partitions or without"


def _open_content(file: "HostFile", path: Path) -> "tuple[Reader, int]":
    """A reader of the disk as its guest sees it, and its size."""
    if path.suffix != QCOW2:
        return file.read, file.size_bytes
    from vmkit.roots.qcow2 import Qcow2Disk, read_header, require_named  # noqa: PLC0415

    header = read_header(file.read)
    # QEMU would open the files that it names. Who made a disk must not choose which of its user's files a guest reads.
    require_named(header, path, ())
    return Qcow2Disk(header, file.read).read, header.size_bytes


def name_machine(root: Path | str) -> str:
    """The name of a machine after its root's file, or after the words that its user gave for the root."""
    stem = Path(root).stem.removesuffix(".tar")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:MAX_NAME_CHARACTERS]
    return stem or ANY


def read_head(path: Path, what: str, *, write: bool = False, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of a file or block device that can be opened as needed. Raises HostError."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HostError(f"cannot use {what} {path}: it is a directory")
        # Opening a FIFO would wait for its other end.
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise HostError(f"cannot use {what} {path}: it is neither a file nor a block device")
        with path.open("r+b" if write else "rb") as file:
            return file.read(size)
    except OSError as error:
        hint = "a new one of 1 GiB: truncate -s 1G FILE" if isinstance(error, FileNotFoundError) and write else ""
        raise HostError(f"cannot use {what} {path}: {os.strerror(error.errno or 0)}", hint=hint) from error
