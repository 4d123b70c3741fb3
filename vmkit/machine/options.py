"""The one table of machine options: what the command line, vmkit.Machine and matrix files have, and how it is read.

The options of parts are in their files. The signature of vmkit.Machine is written out, so that editors and mypy know
it; tests/vmkit/machine/test_options.py compares it with this table.
"""

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from vmkit.machine.parts.part import Kind, Option
from vmkit.machine.parts.table import PARTS
from vmkit.machine.spec import (
    DEFAULT_CPUS,
    DEFAULT_MEMORY_MIB,
    DEFAULT_TIMEOUT_S,
    Accelerator,
    Backend,
    MachineSpec,
    parse_choice,
    parse_memory,
    read_path,
)

# In the order of `vmkit up --help`.
OPTIONS: tuple[Option, ...] = (
    Option(
        "name",
        Kind.TEXT,
        flag="--name",
        metavar="NAME",
        help="Name of the machine: letters, digits, dots, dashes and underscores [default: the image's name].",
        is_python=True,
    ),
    Option(
        "cid",
        Kind.INTEGER,
        flag="--cid",
        metavar="N",
        help="CID, the machine's address on vsock: 3 or higher [default: the lowest free one].",
        is_python=True,
    ),
    Option(
        "memory",
        Kind.TEXT,
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
        Kind.INTEGER,
        DEFAULT_CPUS,
        flag="--cpus",
        metavar="N",
        help="Number of virtual CPUs.",
        shows_default=True,
        is_python=True,
        is_matrix=True,
    ),
    Option(
        "accelerator",
        Kind.CHOICE,
        flag="--accel",
        help="What runs the guest: KVM, or QEMU's slower emulator (tcg). auto takes KVM where it works.",
        words=("auto", "kvm", "tcg"),
        shows_default=True,
        read=partial(parse_choice, Accelerator, "accelerator"),
        is_python=True,
    ),
    Option(
        "backend",
        Kind.CHOICE,
        flag="--backend",
        help="vsock device: the kernel's (vhost) or vmkit's own (user). auto takes vhost where it works.",
        words=("auto", "vhost", "user"),
        shows_default=True,
        read=partial(parse_choice, Backend, "backend"),
        is_python=True,
    ),
    Option(
        "kernel",
        Kind.PATH,
        flag="--kernel",
        metavar="FILE",
        help="Boot this kernel, a bzImage or a vmlinux with a PVH entry, instead of the image's.",
        read=read_path,
        is_python=True,
    ),
    Option(
        "append",
        Kind.TEXT,
        "",
        flag="--append",
        help="Add these words to the kernel command line, such as 'loglevel=7'.",
        is_python=True,
        is_matrix=True,
    ),
    *(option for part in PARTS for option in part.options),
    Option(
        "cpu",
        Kind.TEXT,
        flag="--cpu",
        metavar="MODEL",
        help="CPU model and features, as for QEMU's -cpu [default: every feature that works].",
        is_python=True,
    ),
    Option(
        "timeout_s",
        Kind.SECONDS,
        DEFAULT_TIMEOUT_S,
        flag="--timeout",
        help="Seconds to wait until the guest is ready.",
        shows_default=True,
        is_python=True,
    ),
    Option(
        "token",
        Kind.SWITCH,
        False,
        flag="--token",
        help="Demand a secret token from each client; vsh finds it by itself [always on with vhost].",
        is_python=True,
    ),
)
_FIELDS = frozenset(field.name for field in fields(MachineSpec))


def make_spec(image: str, values: Mapping[str, Any]) -> MachineSpec:
    """A machine of options by their names; what is missing has its default. Raises ConfigError.

    Options of one field are tuples, and follow each other there.
    """
    known: dict[str, Any] = {}
    more: dict[str, Any] = {}
    for option in OPTIONS:
        field = option.field or option.name
        value = option.read(values.get(option.name, option.default))
        place = known if field in _FIELDS else more
        place[field] = (*place[field], *value) if field in place else value
    return MachineSpec(image=image, more=tuple(more.items()), **known)
