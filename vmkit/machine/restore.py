"""Which snapshot a machine starts from, if any: the facts of its key, why it can have none, and where it is.

Facts are everything that decides the guest's memory: another image, QEMU, processor or option means another key.
"""

import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vmkit.architectures import HOST
from vmkit.errors import ConfigError, HostError, MachineError
from vmkit.image.cache import find_cache_dir
from vmkit.machine.choose import Choices, plan_hardware
from vmkit.machine.qemu import plan_qemu
from vmkit.machine.spec import (
    FIRST_GUEST_CID,
    INITS,
    Accelerator,
    DiskMode,
    DiskSpec,
    MachineSpec,
    OnReset,
    check_name,
)
from vmkit.snapshots.key import SCHEMA, describe_difference, find_version, make_key
from vmkit.snapshots.store import MADE, Snapshot, Store, read_snapshot

log = logging.getLogger("vmkit")

SNAPSHOTS_VARIABLE = "VMKIT_SNAPSHOTS_DIR"
# In the place of what each machine has of its own.
NEUTRAL_NAME, NEUTRAL_DIRECTORY = "machine", Path("/")
CPU_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
# The fields of a spec that a snapshot with a name remembers; all others are the new machine's own.
KEPT_FIELDS = ("image", "memory_mib", "cpus", "append", "cpu")
KEPT_PATHS = ("kernel", "tree", "modules", "root")
NO_INIT = "none"


@dataclass(frozen=True, slots=True)
class SnapshotSource:
    """The snapshot that a machine starts from. name: for a person."""

    folder: Path
    name: str
    is_named: bool


def find_snapshots_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$VMKIT_SNAPSHOTS_DIR, else the folder snapshots of the cache. Raises HostError where there is no home."""
    named = environ.get(SNAPSHOTS_VARIABLE)
    return Path(named).absolute() if named else find_cache_dir(environ) / "snapshots"


def open_store() -> Store:
    """The snapshots of this user."""
    return Store(find_snapshots_dir())


def find_obstacle(spec: MachineSpec, choices: Choices) -> str:
    """Why no snapshot of such a machine can be made or used; empty when nothing stands against it."""
    foreign = f"it is of {spec.architecture}, and only machines of {HOST} can be saved"
    obstacles = (
        (spec.architecture != HOST, foreign),
        (spec.netdev is not None, "it has a network device"),
        (spec.gdb or spec.gdb_port is not None, "gdb is served, which is for a boot"),
        (spec.vmcore is not None, "a panic is dumped, which is for a boot"),
        (spec.root_from is not None, "its root is a folder of the host, which can change"),
        (spec.stored is not None, "it keeps what its guest writes"),
        (spec.user_data is not None, "it gets data for its cloud-init"),
        (spec.on_reset is OnReset.RESTART, "a reboot would need another kernel command line than its restore"),
        (bool(spec.more), "it has a part that cannot be saved"),
    )
    found = next((text for is_there, text in obstacles if is_there), "")
    return found or _find_disk_obstacle(spec, choices)


def _find_disk_obstacle(spec: MachineSpec, choices: Choices) -> str:
    for disk in spec.disks:
        if disk.mode is DiskMode.READ_WRITE:
            return f"it can write to the disk {disk.path}"
    root = (choices.root,) if choices.built.takes_root and choices.root is not None else ()
    for path in (*root, *(disk.path for disk in spec.disks)):
        if not stat.S_ISREG(path.stat().st_mode):
            return f"the disk {path} is a device, whose content can change unseen"
    return ""


def find_facts(spec: MachineSpec, choices: Choices) -> dict[str, Any]:
    """Everything that the memory of such a machine depends on."""
    neutral = replace(spec, token=False)
    hardware = plan_hardware(neutral, choices, NEUTRAL_NAME, FIRST_GUEST_CID, NEUTRAL_DIRECTORY)
    paths: list[str | Path] = [
        choices.qemu.path,
        *filter(None, (spec.kernel, spec.root)),
        # That of a build tree is another one after each build.
        *(() if spec.tree is None else (choices.kernel,)),
        *(disk.path for disk in spec.disks),
    ]
    return {
        "schema": SCHEMA,
        "vmkit": find_version(),
        "image": choices.built.digest,
        "qemu": [*_identify(paths[0]), choices.qemu.render_version()],
        "argv": list(plan_qemu(hardware).argv),
        "accelerator": choices.accelerator.value,
        "processor": _read_processor() if choices.accelerator is Accelerator.KVM else {},
        "files": [_identify(path) for path in paths[1:]],
    }


def name_image(spec: MachineSpec, choices: Choices) -> str:
    """What a snapshot is of, for a person: the image, or what the user gave as the root."""
    if choices.built.takes_root and choices.root is not None:
        return spec.source or str(choices.root)
    return choices.built.name


def find_source(spec: MachineSpec, choices: Choices) -> SnapshotSource | None:
    """The snapshot to start from; None: the machine boots.

    Raises MachineError, ConfigError where a snapshot was asked for by name and does not fit.
    """
    if spec.snapshot is not None:
        return _find_named(spec, choices)
    store = open_store()
    try:
        if spec.boot or not (store.folder / MADE).is_dir() or find_obstacle(spec, choices):
            return None
        folder = store.find_made(make_key(find_facts(spec, choices)))
        if not folder.is_dir() and choices.built.takes_root and spec.init == NO_INIT:
            # A guest whose pid 1 is systemd has no snapshot. So one of the same machine with `auto` has vmkit's init.
            folder = store.find_made(make_key(find_facts(replace(spec, init=INITS[0]), choices)))
        if not folder.is_dir():
            return None
    except PermissionError as error:
        log.warning("cannot look for a snapshot in %s: %s; the machine boots", error.filename, error.strerror)
        return None
    store.touch(folder)
    return SnapshotSource(folder, folder.name[:12], is_named=False)


def drop_source(source: SnapshotSource) -> None:
    """Removes a snapshot that is of no use."""
    try:
        open_store().remove(source.folder)
    except OSError:
        # Another start was faster.
        return


def take_options(spec: MachineSpec) -> MachineSpec:
    """The spec with the options of the snapshot that it names. Raises ConfigError for options against those."""
    if spec.snapshot is None:
        return spec
    if spec.boot:
        raise ConfigError("--boot excludes --snapshot: a boot would lack what the snapshot has")
    options = parse_options(read_named(spec.snapshot).record.options)
    default = MachineSpec()
    asked = replace(spec, image=_spell_image(spec.image))
    for name, value in options.items():
        if getattr(asked, name) not in (getattr(default, name), value):
            raise ConfigError(
                f"the snapshot '{spec.snapshot}' has another {name.replace('_mib', '')} than you ask for",
                hint="leave the option out, or save another snapshot",
            )
    return replace(spec, **options)


def read_named(name: str) -> Snapshot:
    """The snapshot that a user gave a name. Raises MachineError."""
    store = open_store()
    try:
        return read_snapshot(store.find_named(check_name(name)))
    except FileNotFoundError as error:
        raise MachineError(
            f"there is no snapshot '{name}'",
            hint="vmkit snapshot save makes one, and vmkit snapshot list shows those there are",
        ) from error


def render_options(spec: MachineSpec) -> dict[str, Any]:
    """What a snapshot with a name remembers of its machine, for JSON."""
    options: dict[str, Any] = {name: getattr(spec, name) for name in KEPT_FIELDS}
    options |= {name: None if getattr(spec, name) is None else str(getattr(spec, name)) for name in KEPT_PATHS}
    return options | {"image": _spell_image(spec.image), "disks": [str(disk.path) for disk in spec.disks]}


def parse_options(value: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a spec, as render_options() wrote them."""
    options: dict[str, Any] = {name: value[name] for name in KEPT_FIELDS}
    # Those of an earlier vmkit lack the newer options.
    options |= {name: None if value.get(name) is None else Path(value[name]) for name in KEPT_PATHS}
    return options | {"disks": tuple(DiskSpec(Path(path)) for path in value["disks"])}


def _spell_image(image: str) -> str:
    """An image in words that lead to it from every directory: a shipped name, or the absolute path of a recipe."""
    is_path = "/" in image or image.endswith(".toml")
    return str(Path(image).expanduser().absolute()) if is_path else image


def _find_named(spec: MachineSpec, choices: Choices) -> SnapshotSource:
    assert spec.snapshot is not None
    obstacle = find_obstacle(spec, choices)
    if obstacle:
        raise ConfigError(f"this machine cannot start from a snapshot: {obstacle}")
    snapshot = read_named(spec.snapshot)
    facts = find_facts(spec, choices)
    if make_key(facts) != snapshot.record.key:
        raise MachineError(
            f"the snapshot '{spec.snapshot}' does not fit any more: "
            f"{describe_difference(snapshot.record.facts, facts)} changed since it was saved",
            hint=f"vmkit snapshot rm {spec.snapshot}, and save it again",
        )
    open_store().touch(snapshot.folder)
    return SnapshotSource(snapshot.folder, spec.snapshot, is_named=True)


def _identify(path: str | Path) -> list[object]:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise HostError(f"cannot look at {path}: {error.strerror}") from error
    return [str(path), status.st_size, status.st_mtime_ns]


def _read_processor() -> dict[str, str]:
    """What tells this host's processor from others that a guest under KVM would notice."""
    found: dict[str, str] = {}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123  (see the others)
        for line in file:
            name, colon, value = line.partition(":")
            if not colon:
                break
            if name.strip() in CPU_FACTS:
                found[name.strip()] = value.strip()
    return found
