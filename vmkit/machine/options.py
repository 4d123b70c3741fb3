"""The one table of machine options: what the command line, vmkit.Machine and matrix files have, and how it is read.

The options of parts are in their files. The signature of vmkit.Machine is written out, so that editors and mypy know
it; tests/vmkit/machine/test_options.py compares it with this table.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from os import PathLike
from typing import Any

from vmkit.architectures import ARCHITECTURES, HOST, find_architecture
from vmkit.errors import ConfigError
from vmkit.machine.parts.part import Option, OptionKind
from vmkit.machine.parts.table import PARTS
from vmkit.machine.source import ANY, find_source
from vmkit.machine.spec import (
    DEFAULT_CPUS,
    DEFAULT_IMAGE,
    DEFAULT_MEMORY_MIB,
    DEFAULT_TIMEOUT_S,
    Accelerator,
    Backend,
    MachineSpec,
    OnReset,
    parse_choice,
    parse_memory,
    parse_on_reset,
    read_path,
)

# In the order of `vmkit up --help`.
OPTIONS: tuple[Option, ...] = (
    Option(
        "name",
        OptionKind.TEXT,
        flag="--name",
        metavar="NAME",
        help="Name of the machine: letters, digits, dots, dashes and underscores [default: the image's name].",
        is_python=True,
    ),
    Option(
        "cid",
        OptionKind.INTEGER,
        flag="--cid",
        metavar="CID",
        help="CID, the machine's address on vsock: 3 or higher [default: the lowest free one].",
        is_python=True,
    ),
    Option(
        "memory",
        OptionKind.TEXT,
        DEFAULT_MEMORY_MIB,
        flag="--memory",
        metavar="SIZE",
        help="Memory of the guest in MiB, or with a unit: 1G.",
        shows_default=True,
        field="memory_mib",
        read=lambda value: value if isinstance(value, int) else parse_memory(value),
        is_python=True,
        is_matrix=True,
    ),
    Option(
        "cpus",
        OptionKind.INTEGER,
        DEFAULT_CPUS,
        flag="--cpus",
        metavar="COUNT",
        help="Number of virtual CPUs.",
        shows_default=True,
        is_python=True,
        is_matrix=True,
    ),
    Option(
        "accelerator",
        OptionKind.CHOICE,
        flag="--accel",
        help="What runs the guest: KVM, or QEMU's slower emulator (tcg). auto takes KVM where it works.",
        words=("auto", "kvm", "tcg"),
        shows_default=True,
        read=partial(parse_choice, Accelerator, "accelerator"),
        is_python=True,
    ),
    Option(
        "backend",
        OptionKind.CHOICE,
        flag="--backend",
        help="vsock device: the kernel's (vhost) or vmkit's own (user). auto takes vhost where it works.",
        words=("auto", "vhost", "user"),
        shows_default=True,
        read=partial(parse_choice, Backend, "backend"),
        is_python=True,
    ),
    Option(
        "arch",
        OptionKind.CHOICE,
        flag="--arch",
        help="Architecture of the guest. QEMU emulates all but amd64, and they have no snapshots.",
        words=tuple(ARCHITECTURES),
        shows_default=True,
        field="architecture",
        read=lambda name: HOST if name is None else find_architecture(name).name,
        is_python=True,
    ),
    Option(
        "kernel",
        OptionKind.PATH,
        flag="--kernel",
        metavar="FILE",
        help="Boot this kernel, a bzImage or a vmlinux with a PVH entry, instead of the image's.",
        read=read_path,
        is_python=True,
    ),
    Option(
        "append",
        OptionKind.TEXT,
        "",
        flag="--append",
        metavar="WORDS",
        help="Add these words to the kernel command line, such as 'loglevel=7'.",
        is_python=True,
        is_matrix=True,
    ),
    *(option for part in PARTS for option in part.options),
    Option(
        "cpu",
        OptionKind.TEXT,
        flag="--cpu",
        metavar="MODEL",
        help="CPU model and features, as for QEMU's -cpu [default: every feature that works].",
        is_python=True,
    ),
    Option(
        "timeout_s",
        OptionKind.SECONDS,
        DEFAULT_TIMEOUT_S,
        flag="--timeout",
        help="Seconds to wait until the guest is ready.",
        shows_default=True,
        is_python=True,
    ),
    Option(
        "on_reset",
        OptionKind.CHOICE,
        OnReset.END.value,
        flag="--on-reset",
        help="What a reset of the guest does: end the machine, or restart it, as a reboot should.",
        words=tuple(word.value for word in OnReset),
        shows_default=True,
        read=parse_on_reset,
        is_python=True,
    ),
    Option(
        "token",
        OptionKind.SWITCH,
        False,
        flag="--token",
        help="Demand a secret token from each client; vsh finds it by itself [always on with vhost].",
        is_python=True,
    ),
    Option(
        "boot",
        OptionKind.SWITCH,
        False,
        flag="--boot",
        help="Boot the guest, although there is a snapshot of it (see `vmkit snapshot --help`).",
        is_python=True,
    ),
    Option(
        "snapshot",
        OptionKind.TEXT,
        flag="--snapshot",
        metavar="NAME",
        help="Start from the snapshot that `vmkit snapshot save NAME` made, with its image and options.",
        is_python=True,
    ),
)
_FIELDS = frozenset(field.name for field in fields(MachineSpec))


# What Python may give for an option of a kind, and what that is called. Its default's own type fits as well.
_KINDS: dict[OptionKind, tuple[tuple[type, ...], str]] = {
    OptionKind.TEXT: ((str,), "text"),
    OptionKind.INTEGER: ((int,), "a whole number"),
    OptionKind.SECONDS: ((int, float), "a number of seconds"),
    OptionKind.PATH: ((str, PathLike), "a path"),
    OptionKind.PATHS: ((list, tuple), "a list of paths"),
    OptionKind.CHOICE: ((str,), "text"),
    OptionKind.SWITCH: ((bool,), "True or False"),
    OptionKind.VALUED_SWITCH: ((bool,), "True or False"),
    OptionKind.CHOOSING_SWITCH: ((str,), "text"),
}


def make_spec(image: str, values: Mapping[str, Any]) -> MachineSpec:
    """A machine of options by their names; what is missing has its default. Raises ConfigError, HostError.

    image: a name, a recipe's path, or the path of a disk that is the root of the image `any`.

    Options of one field are tuples, and follow each other there.
    """
    unknown = values.keys() - {option.name for option in OPTIONS}
    if unknown:
        raise ConfigError(f"a machine has no option '{min(unknown)}'")
    if not isinstance(image, str):
        raise ConfigError(f"image must be text, not {image!r}")
    known: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for option in OPTIONS:
        field = option.field or option.name
        value = values.get(option.name, option.default)
        _check_kind(option, value)
        value = option.read(value)
        place = known if field in _FIELDS else more
        place[field] = (*place[field], *value) if field in place else value
    source = find_source(image)
    if source is not None:
        if known["root"] is not None:
            raise ConfigError(f"the machine has a root already: {image}", hint="leave --root out")
        image, known["root"], known["source"] = ANY, source.disk, "" if source.disk else source.text
    if known["root_from"] is not None and image == DEFAULT_IMAGE:
        image = ANY
    return MachineSpec(image=image, more=tuple(more.items()), **known)


def _check_kind(option: Option, value: object) -> None:
    """Raises ConfigError for a value that Python gave, of another kind than the option's."""
    kinds, words = _KINDS[option.kind]
    is_default = type(value) is type(option.default)
    # True is an int of Python's, and no number of anything.
    is_odd = isinstance(value, bool) and bool not in kinds
    if option.reads_text:
        words = "text or a whole number"
    if not is_default and (is_odd or not isinstance(value, kinds)):
        raise ConfigError(f"{option.name} must be {words}, not {value!r}")
    if option.kind is OptionKind.PATHS and isinstance(value, list | tuple):
        for path in value:
            if not isinstance(path, str | PathLike):
                raise ConfigError(f"{option.name} must be {words}, and {path!r} is not a path")
