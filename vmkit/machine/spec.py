"""The machine that the user asked for: frozen values, checked once at the edge, and nothing else.

Defaults are crosvm's where its users will expect them: 256 MiB, one vCPU, no disk, no network.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vmkit.architectures import HOST, find_architecture
from vmkit.errors import ConfigError

if TYPE_CHECKING:
    from vmkit.roots.settings import ContainerSettings
    from vmkit.stored.record import Base

# Names become a directory below the runtime directory and part of a UNIX socket's path, which may have 107 bytes in
# all (unix(7)).
MAX_NAME_CHARACTERS = 32
NAME_PATTERN = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_CHARACTERS - 1}}}")

# <linux/vm_sockets.h>: 0 is the hypervisor, 1 local, 2 the host, 2^32-1 VMADDR_CID_ANY.
FIRST_GUEST_CID = 3
LAST_GUEST_CID = 2**32 - 2

DEFAULT_IMAGE = "tiny"
DEFAULT_MEMORY_MIB = 256
MIN_MEMORY_MIB = 64
DEFAULT_CPUS = 1
MAX_CPUS = 255
DEFAULT_TIMEOUT_S = 120.0
MAX_PORT = 2**16 - 1
# The root bus of q35 has 32 slots, and other devices are there, too.
MAX_DISKS = 20
# What GPT has room for, unless its maker asked for more.
MAX_PARTITIONS = 128
# A week: longer than any boot, and less than the milliseconds that poll(2) counts in an int.
MAX_TIMEOUT_S = 7 * 24 * 3600.0
# pid 1 of a root that its user gave: systemd where it is there, systemd, vmkit's own.
INITS = ("auto", "systemd", "none")


class Accelerator(StrEnum):
    """How QEMU runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class DiskMode(StrEnum):
    """Whether the guest may write to a disk."""

    READ_ONLY = "ro"
    READ_WRITE = "rw"


class Backend(StrEnum):
    """How the guest's vsock reaches the host: the kernel's vhost-vsock, or our userspace device."""

    VHOST = "vhost"
    USER = "user"


class OnReset(StrEnum):
    """What becomes of a machine whose guest resets itself, as a reboot does."""

    END = "end"
    RESTART = "restart"


Chosen = TypeVar("Chosen", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A file or block device of the host's that the guest has as a disk: raw, or qcow2 where its name ends so."""

    path: Path
    mode: DiskMode = DiskMode.READ_ONLY

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).absolute())


@dataclass(frozen=True, slots=True)
class StoredRoot:
    """The root of a machine that stays, beside its disk, which is the spec's `root`.

    folder: the machine's, with the lock that is held while it runs. base: the file below the disk. base_format: `raw`
    or `qcow2`. root: what the guest is told of the disk, `ext4` or `ext4:2`. grows: whether the disk is larger than its
    file system, which the guest then makes as large. made, record: of the machine that was looked at; another one can
    have its name by now.
    """

    name: str
    folder: Path
    base: Path
    base_format: str
    root: str
    grows: bool = False
    made: float = 0.0
    record: "Base | None" = None


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """One machine as asked for; None means: vmkit chooses, and prints its choice.

    tree: the build tree of the kernel; modules: the folder with those of `kernel`. root replaces the disk of an image
    whose root is one, or is that of an image that has none; partition: in that disk. root_from: a folder of the host in
    the place of that disk. disks are the guest's disks after that, in their order. gdb: serve gdb's protocol on a UNIX
    socket in the machine's directory; gdb_port: on this port of the loopback, which every user of the host can reach.
    cpu: a model and features, as QEMU's -cpu has them. netdev: gives the guest a network device with this behind it, as
    QEMU's -netdev has it, without an id: for measuring against, and so no option of the command line. record: the
    folder of the host into which vsh records its sessions. vmcore: the format of the dump that is kept at a panic.
    architecture: the guest's, by Debian's name. on_reset: what a reset of the guest does to the machine. more: name and
    value of each option that has no field here.
    """

    image: str = DEFAULT_IMAGE
    name: str | None = None
    cid: int | None = None
    memory_mib: int = DEFAULT_MEMORY_MIB
    cpus: int = DEFAULT_CPUS
    accelerator: Accelerator | None = None
    backend: Backend | None = None
    kernel: Path | None = None
    tree: Path | None = None
    modules: Path | None = None
    append: str = ""
    timeout_s: float = DEFAULT_TIMEOUT_S
    # Demand the machine's token where the backend does not do so anyway.
    token: bool = False
    root: Path | None = None
    root_from: Path | None = None
    partition: int | None = None
    # What the root's disk is made of at the start; "": there is a disk already.
    source: str = ""
    # What sessions have, where the root is a container image's; known when its disk is made.
    container: "ContainerSettings | None" = None
    init: str = INITS[0]
    user_data: Path | None = None
    # Where the root keeps what the guest writes.
    stored: StoredRoot | None = None
    disks: tuple[DiskSpec, ...] = ()
    gdb: bool = False
    gdb_port: int | None = None
    cpu: str | None = None
    netdev: str | None = None
    record: Path | None = None
    # The format of a dump of the guest's memory, kept when its kernel panics.
    vmcore: str | None = None
    # Keep the cores of the guest's programs.
    cores: bool = False
    # Of the guest; others than the host's are emulated.
    architecture: str = HOST
    on_reset: OnReset = OnReset.END
    # Start it by a boot, although it has a snapshot; or from the snapshot that the user gave this name.
    boot: bool = False
    snapshot: str | None = None
    more: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # QEMU runs in the machine's directory, where a relative path leads elsewhere.
        for name in ("kernel", "tree", "modules", "root", "root_from", "record", "user_data"):
            object.__setattr__(self, name, read_path(getattr(self, name)))
        if self.name is not None:
            check_name(self.name)
        if self.cid is not None and not FIRST_GUEST_CID <= self.cid <= LAST_GUEST_CID:
            raise ConfigError(
                f"--cid must be between {FIRST_GUEST_CID} and {LAST_GUEST_CID}, not {self.cid}",
                hint="0 to 2 and 2^32-1 are reserved",
            )
        if self.memory_mib < MIN_MEMORY_MIB:
            raise ConfigError(f"--memory must be at least {MIN_MEMORY_MIB} MiB, not {self.memory_mib}")
        if not 1 <= self.cpus <= MAX_CPUS:
            raise ConfigError(f"--cpus must be between 1 and {MAX_CPUS}, not {self.cpus}")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"--timeout must be above 0 and at most {MAX_TIMEOUT_S:.0f} seconds, not {self.timeout_s:g}",
            )
        if find_architecture(self.architecture).is_emulated and self.accelerator is Accelerator.KVM:
            raise ConfigError(
                f"KVM runs guests of this host's architecture, {HOST}, and the machine is {self.architecture}",
                hint="leave --accel out",
            )
        # Parts know this class, and the smallest programs need no part.
        from vmkit.machine.parts.table import PARTS  # noqa: PLC0415

        for part in PARTS:
            part.check(self)
        if self.cpu is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+,=-]*", self.cpu, re.ASCII):
            raise ConfigError(
                f"'{self.cpu}' is not a CPU model", hint="give one as for QEMU's -cpu: max, or qemu64,-cx16"
            )
        if "\0" in self.append or "\n" in self.append:
            raise ConfigError("--append must not contain a NUL or a newline")

    def find_more(self, name: str) -> Any:
        """The value of an option that has no field; None when it was not given."""
        return dict(self.more).get(name)


def check_name(name: str) -> str:
    """`name` if a machine can be called so; else ConfigError."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"'{name}' cannot be a machine's name",
            hint="use 1 to 32 letters, digits, '.', '_' or '-', and begin with a letter or digit",
        )
    return name


def make_disks(read_only: Sequence[str | Path], read_write: Sequence[str | Path]) -> tuple[DiskSpec, ...]:
    """The guest's disks after its root: first those it may only read, then those it may write."""
    paths = [(path, DiskMode.READ_ONLY) for path in read_only] + [(path, DiskMode.READ_WRITE) for path in read_write]
    return tuple(DiskSpec(Path(path).absolute(), mode) for path, mode in paths)


def read_path(path: str | Path | None) -> Path | None:
    """An absolute path, or None."""
    return None if path is None else Path(path).absolute()


def parse_choice(kinds: type[Chosen], key: str, word: str | None) -> Chosen | None:
    """A member of `kinds` by its value; None and "auto" leave the choice to vmkit. Raises ConfigError."""
    if word is None or word == "auto":
        return None
    try:
        return kinds(word)
    except ValueError as error:
        known = ", ".join(("auto", *(kind.value for kind in kinds)))
        raise ConfigError(f"{key} must be one of {known}, not '{word}'") from error


def parse_on_reset(word: str) -> OnReset:
    """What a reset does, by its word. Raises ConfigError."""
    try:
        return OnReset(word)
    except ValueError as error:
        raise ConfigError(f"on_reset must be one of {', '.join(OnReset)}, not '{word}'") from error


def parse_memory(text: str) -> int:
    """`512`, `512M` or `2G` to MiB."""
    match = re.fullmatch(r"(\d{1,9})([MmGg]?)(?:[Ii]?[Bb])?", text)
    if not match:
        raise ConfigError(f"'{text}' is not an amount of memory", hint="give MiB, or a number with a unit: 512M, 2G")
    return int(match[1]) * (1024 if match[2] in ("G", "g") else 1)
