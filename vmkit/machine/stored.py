"""Machines that stay: from what a user names to a stored machine, and from a stored machine to a spec that starts it.

vmkit.stored keeps their folders, and knows no machine.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmkit.errors import BuildError, ConfigError, MachineError, VmkitError
from vmkit.machine.spec import MachineSpec, StoredRoot, check_name

if TYPE_CHECKING:
    from vmkit.roots.prepare import PreparedRoot
    from vmkit.roots.settings import ContainerSettings
    from vmkit.stored.record import StoredRecord
    from vmkit.stored.store import Stored

# Of a root that vmkit packs. It takes no room before the guest fills it.
DEFAULT_DISK_BYTES = 10 << 30
MIB = 1 << 20
SECTOR_BYTES = 512
# An ext4 cannot grow by less than a group of blocks' tables, and then stays as it is.
MIN_GROWTH_BYTES = 128 * MIB
EXT4 = "ext4"
# They say what the machine is, which it is for good; or how a machine of an image starts.
NOT_STORED = ("name", "root", "root_from", "partition", "snapshot")
# These are for one start.
NOT_KEPT = (*NOT_STORED, "boot", "gdb", "gdb_port", "vmcore", "cores")

Tell = Callable[[str, float | None], None]


def parse_disk_size(text: str) -> int:
    """`10G`, `512M` or `1T` to bytes; a number alone is MiB, as for memory. Raises ConfigError."""
    from vmkit.stored.overlay import MAX_DISK_BYTES  # noqa: PLC0415 - most machines are of an image

    match = re.fullmatch(r"(\d{1,9})([MmGgTt]?)(?:[Ii]?[Bb])?", text)
    if not match:
        raise ConfigError(f"'{text}' is not a size of a disk", hint="give a number with a unit: 512M, 10G")
    size = int(match[1]) * MIB << {"": 0, "m": 0, "g": 10, "t": 20}[match[2].lower()]
    if not MIB <= size <= MAX_DISK_BYTES:
        raise ConfigError(f"--disk-size must be between 1M and {MAX_DISK_BYTES >> 40}T, not {text}")
    return size


def create_stored(
    name: str,
    source: str,
    options: Mapping[str, Any],
    *,
    partition: int | None = None,
    disk_bytes: int | None = None,
    tell: Tell | None = None,
) -> "Stored":
    """Makes a stored machine of a root. options: those of `vmkit up` that were given, by their names.

    disk_bytes: of the disk that the guest sees; None: 10 GiB for a root that is packed, its own size for a disk.
    Raises ConfigError, NameInUseError, BuildError, HostError; nothing is left behind when it does.
    """
    # Few programs make one.
    from vmkit.stored.store import make_stored, read_stored, require_free  # noqa: PLC0415

    check_stored_name(name)
    require_free(name)
    kept = _keep_options(options)
    spec = _make_plain_spec(name, kept)
    _check_host(spec)
    say = tell or (lambda _text, _fraction: None)
    source, prepared = _prepare(source, partition, spec.architecture, say)
    with make_stored(name) as new:
        new.record = _fill(new.folder, name, source, prepared, disk_bytes, kept)
    return read_stored(name)


def check_stored_name(name: str) -> None:
    """Raises ConfigError for a name that no stored machine can have."""
    from vmkit.image.recipe.resources import find_images_dir  # noqa: PLC0415 - few programs make one

    check_name(name)
    if name.endswith(".toml"):
        raise ConfigError(f"'{name}' cannot be a stored machine's name: it is the path of a recipe")
    if (find_images_dir() / f"{name}.toml").exists():
        raise ConfigError(
            f"'{name}' is the name of an image, and `vmkit up {name}` starts a machine of that",
            hint="choose another name",
        )


def _keep_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as JSON has them. Paths become absolute."""
    refused = sorted(options.keys() & set(NOT_KEPT))
    if refused:
        raise ConfigError(f"vmkit cannot create a stored machine with the option {refused[0]}")
    return {key: _render_value(value) for key, value in options.items()}


def _render_value(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return str(Path(value).absolute())
    if isinstance(value, list | tuple):
        return [_render_value(one) for one in value]
    return value


def _make_plain_spec(name: str, options: Mapping[str, Any]) -> MachineSpec:
    """The spec without its root. Raises ConfigError for options that cannot be."""
    from vmkit.machine.options import make_spec  # noqa: PLC0415 - it knows the parts
    from vmkit.machine.source import ANY  # noqa: PLC0415

    return make_spec(ANY, {**options, "name": name})


def _check_host(spec: MachineSpec) -> None:
    """Raises ConfigError, HostError for options that this host cannot fulfil: else each start would fail by them."""
    from vmkit.machine.own_kernel import read_kernel  # noqa: PLC0415 - few programs make one
    from vmkit.machine.parts.table import PARTS  # noqa: PLC0415

    read_kernel(spec)
    for part in PARTS:
        part.check_host(spec)


def _prepare(source: str, partition: int | None, architecture: str, tell: Tell) -> "tuple[str, PreparedRoot]":
    """The root's name, and the disk or the packed root that a machine is based on.

    Raises ConfigError for what cannot be written.
    """
    from vmkit.machine.source import find_source  # noqa: PLC0415 - most machines are of an image
    from vmkit.roots.prepare import prepare_root  # noqa: PLC0415

    found = find_source(source)
    if found is None:
        raise ConfigError(
            f"'{source}' is an image or a recipe, and a stored machine needs a root of yours",
            hint="give a folder, an archive, a disk by its path, or a container image: docker://debian:stable",
        )
    prepared = prepare_root(found.text, partition=partition, architecture=architecture, progress=tell, is_writable=True)
    if prepared.file_system.value != EXT4:
        raise ConfigError(
            f"{source} holds {prepared.file_system.value}, and a stored machine needs an ext4 or what becomes one",
            hint="unpack it, and give the folder",
        )
    if not prepared.key and not prepared.path.is_file():
        raise ConfigError(
            f"{source} is a device, whose content can change unseen", hint="copy it into a file, and give that"
        )
    return found.text, prepared


def _fill(
    folder: Path,
    name: str,
    source: str,
    prepared: "PreparedRoot",
    disk_bytes: int | None,
    options: Mapping[str, Any],
) -> "StoredRecord":
    """Puts the base and the empty disk into a machine's new folder. Returns its record."""
    from vmkit.machine.source import adapt_settings  # noqa: PLC0415
    from vmkit.stored.base import BASE, describe_base, take_base  # noqa: PLC0415 - few programs make one
    from vmkit.stored.overlay import write_overlay  # noqa: PLC0415
    from vmkit.stored.record import StoredRecord  # noqa: PLC0415
    from vmkit.stored.store import DISK  # noqa: PLC0415

    if prepared.key:
        try:
            base, path = take_base(prepared.path, folder, prepared.disk_format), BASE
        except FileNotFoundError as error:
            raise BuildError("the root vanished from the cache while vmkit used it", hint="try again") from error
    else:
        path = str(prepared.path)
        base = describe_base(prepared.path, path, prepared.disk_format)
    size = _choose_size(folder / path, prepared, disk_bytes)
    write_overlay(folder / DISK, size, path, prepared.disk_format)
    kind = prepared.file_system.value
    settings = adapt_settings(prepared.settings, source)
    return StoredRecord(
        name=name,
        source=source,
        made=round(time.time(), 3),
        root=kind if prepared.partition is None else f"{kind}:{prepared.partition.number}",
        disk_bytes=size,
        base=base,
        options=options,
        container={} if settings is None else asdict(settings),
    )


def _choose_size(path: Path, prepared: "PreparedRoot", asked: int | None) -> int:
    from vmkit.stored.overlay import MAX_DISK_BYTES  # noqa: PLC0415 - few programs make one

    own = measure_disk(path, prepared.disk_format)
    if own > MAX_DISK_BYTES:
        raise ConfigError(
            f"the disk {path} is larger than the {MAX_DISK_BYTES >> 40}T that a stored machine can have: {own} bytes",
            hint="make its file system and the disk smaller first: resize2fs, qemu-img resize --shrink",
        )
    own = -(-own // SECTOR_BYTES) * SECTOR_BYTES
    if prepared.partition is not None:
        if asked is not None:
            raise ConfigError(
                "--disk-size cannot make a partition larger",
                hint="make the disk and its partition larger first: qemu-img resize, growpart",
            )
        return own
    if asked is None:
        return max(own, DEFAULT_DISK_BYTES) if prepared.key else own
    if asked < own:
        raise ConfigError(f"--disk-size must be at least {-(-own // MIB)}M: that is what the root needs")
    return asked


def measure_disk(path: Path, disk_format: str) -> int:
    """The bytes that a guest sees of a disk. Raises OSError, BuildError."""
    from vmkit.roots.extents import HostFile  # noqa: PLC0415 - most machines are of an image
    from vmkit.roots.qcow2 import read_header  # noqa: PLC0415

    with HostFile(path) as file:
        return read_header(file.read).size_bytes if disk_format == "qcow2" else file.size_bytes


def make_stored_spec(name: str, given: Mapping[str, Any]) -> MachineSpec:
    """What starts a stored machine. given: the options of this start, before those that the machine was created with.

    Raises MachineError for a machine that cannot start, ConfigError for options that do not fit it.
    """
    from vmkit.machine.options import make_spec  # noqa: PLC0415 - it knows the parts
    from vmkit.machine.source import ANY  # noqa: PLC0415
    from vmkit.stored.base import require_same  # noqa: PLC0415
    from vmkit.stored.store import read_stored  # noqa: PLC0415

    for option in NOT_STORED:
        if given.get(option) is not None:
            raise ConfigError(
                f"--{option.replace('_', '-')} does not fit '{name}', which is a stored machine", hint="leave it out"
            )
    stored = read_stored(name)
    record = stored.require_record()
    if not stored.disk.is_file():
        raise MachineError(
            f"the disk of '{name}' is missing: {stored.disk}",
            hint=f"put it back from a copy; or vmkit rm {name}, and create it again",
        )
    base = require_same(record.base, stored.folder, name)
    root = StoredRoot(
        name=name,
        folder=stored.folder,
        base=base,
        base_format=record.base.disk_format,
        root=record.root,
        grows=_look_for_growth(stored, base, record),
        made=record.made,
        record=record.base,
    )
    _check_known(record)
    spec = make_spec(ANY, {**record.options, **given, "name": name})
    return replace(spec, root=stored.disk, source=record.source, stored=root, container=_parse_container(record))


def _parse_container(record: "StoredRecord") -> "ContainerSettings | None":
    """Raises MachineError."""
    if not record.container:
        return None
    from vmkit.roots.settings import ContainerSettings  # noqa: PLC0415 - most roots are none of an image's

    names = {field.name for field in fields(ContainerSettings)}
    try:
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.container.items()
        }
        return ContainerSettings(**{name: given[name] for name in names})
    except (KeyError, TypeError) as error:
        raise MachineError(
            f"the record of the machine '{record.name}' is damaged: its settings are none of a container image",
            hint=f"vmkit rm {record.name} removes the machine with its disk",
        ) from error


def _check_known(record: "StoredRecord") -> None:
    """Raises MachineError for an option that a newer vmkit has put into a record."""
    from vmkit.machine.options import OPTIONS  # noqa: PLC0415 - it knows the parts

    unknown = record.options.keys() - {option.name for option in OPTIONS}
    if unknown:
        raise MachineError(
            f"the machine '{record.name}' was created with the option '{min(unknown)}', which this vmkit does not know",
            hint=f"start it with the vmkit that created it; or vmkit rm {record.name}, and create it again",
        )


def _look_for_growth(stored: "Stored", base: Path, record: "StoredRecord") -> bool:
    """Looks whether a machine's file system can grow. Raises MachineError for a damaged disk."""
    from vmkit.stored.store import lock_stored  # noqa: PLC0415 - most machines are of an image

    with contextlib.ExitStack() as stack:
        try:
            # A guest that runs changes the tables of its disk while they are read.
            stack.enter_context(lock_stored(stored))
        except MachineError:
            # It runs, so hold_stored() will refuse a start.
            return False
        try:
            return _can_grow(stored.disk, base, record.base.disk_format, record.root)
        except (VmkitError, OSError) as error:
            reason = error.brief if isinstance(error, VmkitError) else error.strerror
            raise MachineError(
                f"the disk of '{stored.name}' is damaged: {stored.disk}: {reason}",
                hint=f"put it back from a copy; or vmkit rm {stored.name}, and create it again",
            ) from error


def _can_grow(disk: Path, base: Path, base_format: str, root: str) -> bool:
    """Whether the file system of a disk is so much smaller than the disk that the guest is to make it larger."""
    from vmkit.roots.extents import HostFile  # noqa: PLC0415 - most machines are of an image
    from vmkit.roots.qcow2 import Qcow2Disk, read_header  # noqa: PLC0415
    from vmkit.roots.superblocks import find_file_system  # noqa: PLC0415

    if root != EXT4:
        return False
    with contextlib.ExitStack() as stack:
        below, top = (stack.enter_context(HostFile(path)) for path in (base, disk))
        backing = Qcow2Disk(read_header(below.read), below.read).read if base_format == "qcow2" else below.read
        whole = Qcow2Disk(read_header(top.read), top.read, backing=backing)
        found = find_file_system(whole.read)
        return found is not None and whole.size_bytes - found.size_bytes >= MIN_GROWTH_BYTES


@contextlib.contextmanager
def hold_stored(root: StoredRoot) -> Iterator[int]:
    """Holds a stored machine for its start. Yields the lock's descriptor, for the monitor. Raises MachineError."""
    from vmkit.stored.base import require_same  # noqa: PLC0415 - most machines are of an image
    from vmkit.stored.store import lock_stored, read_stored  # noqa: PLC0415

    stored = read_stored(root.name)
    with lock_stored(stored) as fd:
        # No program removes it now. Before, it may have been removed and made again since it was looked at.
        record = read_stored(root.name).require_record()
        if (record.made, record.base) != (root.made, root.record):
            raise MachineError(
                f"the machine '{root.name}' was removed and created again while vmkit started it",
                hint=f"start the new one: vmkit up {root.name}",
            )
        require_same(record.base, stored.folder, root.name)
        yield fd
