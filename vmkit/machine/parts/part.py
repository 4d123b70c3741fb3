"""What a part is: one thing that a machine can have, with everything that belongs to it in one file. Pure.

A part runs in `up` alone. What the monitor has to do for it travels in the launch plan, as a Fitting: sockets to make,
commands for QEMU, a process to tend. So the monitor needs no code of any part, and knows none by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmkit.image.build import BuiltImage
    from vmkit.machine.hardware import Hardware
    from vmkit.machine.spec import MachineSpec

# Words of a companion's argv that stand for descriptors, which the monitor alone knows.
FRONTEND_MARK = "{frontend}"
LISTENER_MARK = "{listener}"
CONTROL_MARK = "{control}"

JsonValue = None | bool | int | str | Mapping[str, "JsonValue"]
JsonObject = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class QmpCommand:
    """One command for QEMU's monitor."""

    name: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True)
class ServedSocket:
    """A UNIX socket in the machine's directory that QEMU serves as a chardev.

    The monitor makes it and not QEMU, so that it is its owner's alone from the start.
    """

    chardev: str
    file: str

    @property
    def mark(self) -> str:
        """Stands in the argv for the chardev."""
        return f"{{served:{self.chardev}}}"

    def render(self, fd: int) -> str:
        """The chardev on a socket that QEMU inherits."""
        return f"socket,id={self.chardev},fd={fd},server=on,wait=off"

    def render_by_hand(self) -> str:
        """The chardev on a socket that QEMU makes."""
        return f"socket,id={self.chardev},path={self.file},server=on,wait=off"


@dataclass(frozen=True, slots=True)
class Companion:
    """A process beside QEMU, which the monitor starts, watches, replaces when it dies, and stops.

    argv: the whole command, with FRONTEND_MARK for its connection to QEMU, LISTENER_MARK for `listen`, CONTROL_MARK
    for `control`.
    title: its name in errors. kind: the word that its events begin with. log: the file for its output.
    listen: a socket in the machine's directory that the monitor makes, and that outlives each process; "": none.
    control: another one, at which the owner's programs ask the process.
    serve: of a process that waits for QEMU at a listening socket, which FRONTEND_MARK is then. The monitor makes the
    socket in the machine's directory, connects QEMU's end to it, and removes it. "": the two ends are a pair.
    is_vital: the machine ends with the process. Otherwise a new one takes its place.
    device: what QEMU takes out before it gets a new process. removal: the commands after that.
    """

    argv: tuple[str, ...]
    title: str
    kind: str
    log: str
    device: str
    removal: tuple[QmpCommand, ...] = ()
    listen: str = ""
    control: str = ""
    serve: str = ""
    is_vital: bool = False


@dataclass(frozen=True, slots=True)
class KnownEnd:
    """Why QEMU ended by itself, where its last words match the regular expression `pattern`.

    brief: may have the groups of the pattern, as re.Match.expand takes them.
    """

    pattern: str
    reason: str
    brief: str
    hint: str


@dataclass(frozen=True, slots=True)
class Fitting:
    """What the monitor does for one part.

    plug: the commands before the guest runs. fd_name: under this name QEMU gets a descriptor first: the connection to
    the companion, or, without one, the descriptor that came with the plan. "": it gets none. ready_socket: the socket
    in the machine's directory at which the guest's READY arrives, where the part brings it. ends: what explains an end.
    device: what QEMU takes out before the machine is saved, of a part without a companion. "": its state is saved.
    ports: free ones, for folders that are shared while the machine runs.
    """

    part: str
    sockets: tuple[ServedSocket, ...] = ()
    plug: tuple[QmpCommand, ...] = ()
    fd_name: str = ""
    companion: Companion | None = None
    ready_socket: str = ""
    ends: tuple[KnownEnd, ...] = ()
    device: str = ""
    ports: tuple[str, ...] = ()


class OptionKind(StrEnum):
    """How an option is written on the command line."""

    TEXT = "text"
    INTEGER = "integer"
    SECONDS = "seconds"
    PATH = "path"
    # Repeatable.
    PATHS = "paths"
    CHOICE = "choice"
    SWITCH = "switch"
    # A switch that may have a value behind `=`.
    VALUED_SWITCH = "valued-switch"
    # A switch that may have one of `words` behind `=`; alone it means the first.
    CHOOSING_SWITCH = "choosing-switch"


def _keep(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table of machine options.

    name: the keyword of vmkit.Machine, and the key below `read`. flag: the command line's word; "": it has none.
    help, metavar, words (of CHOICE and CHOOSING_SWITCH) and shows_default are for `vmkit up --help`. default: as Python
    has it.
    field: of MachineSpec, the name itself where it is ""; an option without a field is in `MachineSpec.more`.
    read: from a value of Python's or the command line's to the field's. is_python, is_matrix: whether vmkit.Machine
    and matrix files have it.
    """

    name: str
    kind: OptionKind
    default: Any = None
    flag: str = ""
    help: str = ""
    metavar: str | None = None
    words: tuple[str, ...] = ()
    shows_default: bool = False
    field: str = ""
    read: Callable[[Any], Any] = _keep
    is_python: bool = False
    is_matrix: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether it is text that stands for another value."""
        return self.kind is OptionKind.TEXT and not isinstance(self.default, str | None)


class Part:
    """One thing that a machine can have. Each method answers for its own part, and by default with nothing.

    log: the file in the machine's directory that its companion prints to; "": it has no companion.
    """

    name = ""
    options: tuple[Option, ...] = ()
    log = ""

    def check(self, spec: "MachineSpec") -> None:
        """Raises ConfigError for options that cannot be."""

    def check_host(self, spec: "MachineSpec") -> None:
        """Raises HostError for what this host cannot give. Called before anything is built."""

    def check_image(self, spec: "MachineSpec", built: "BuiltImage") -> None:
        """Raises ConfigError for options that do not fit the image."""

    def plan_record(self, spec: "MachineSpec") -> dict[str, object]:
        """Keys of machine.json that are known from the options."""
        return {}

    def plan_addresses(self, hardware: "Hardware") -> dict[str, object]:
        """Keys of machine.json that are known once the machine has its directory."""
        return {}

    def plan_argv(self, hardware: "Hardware") -> tuple[str, ...]:
        """Words of QEMU's argv."""
        return ()

    def plan_words(self, hardware: "Hardware") -> tuple[str, ...]:
        """Words of the guest's kernel command line."""
        return ()

    def plan_fitting(self, hardware: "Hardware") -> Fitting | None:
        """What the monitor does for it; None: nothing."""
        return None


def render_options(options: Mapping[str, str]) -> str:
    """QEMU's own form, key=value: JSON could not name a path that is not UTF-8. A comma is doubled."""
    return ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())


def parse_fitting(value: Mapping[str, Any]) -> Fitting:
    """A fitting from its JSON, as dataclasses.asdict has it."""
    companion = value["companion"]
    if companion is not None:
        removal = _parse_commands(companion["removal"])
        companion = Companion(**{**companion, "argv": tuple(companion["argv"]), "removal": removal})
    return Fitting(
        **{
            **value,
            "sockets": tuple(ServedSocket(**socket) for socket in value["sockets"]),
            "plug": _parse_commands(value["plug"]),
            "companion": companion,
            "ends": tuple(KnownEnd(**end) for end in value["ends"]),
            "ports": tuple(value["ports"]),
        }
    )


def _parse_commands(values: list[Mapping[str, Any]]) -> tuple[QmpCommand, ...]:
    return tuple(QmpCommand(value["name"], value["arguments"]) for value in values)
