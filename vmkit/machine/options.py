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
    Option("name", Kind.TEXT, flag="--name", help="Name of the machine [default: the image's name].", is_python=True),
    Option(
        "cid",
        Kind.INTEGER,
        flag="--cid",
        help="vsock context id [default: the lowest free one from 3 on].",
        is_python=True,
    ),
    Option(
        "memory",
        Kind.TEXT,
        DEFAULT_MEMORY_MIB,
        flag="--memory",
        help="MiB, or with a unit: 1G.",
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
        help="Number of vCPUs.",
        shows_default=True,
        is_python=True,
        is_matrix=True,
    ),
    Option(
        "accelerator",
        Kind.CHOICE,
        flag="--accel",
        help="Accelerator of QEMU.",
        words=("auto", "kvm", "tcg"),
        shows_default=True,
        read=partial(parse_choice, Accelerator, "accelerator"),
        is_python=True,
    ),
    Option(
        "backend",
        Kind.CHOICE,
        flag="--backend",
        help="vsock device: the kernel's (vhost) or vmkit's own (user).",
        words=("auto", "vhost", "user"),
        shows_default=True,
        read=partial(parse_choice, Backend, "backend"),
        is_python=True,
    ),
    Option(
        "kernel",
        Kind.PATH,
        flag="--kernel",
        help="Boot this kernel instead of the image's.",
        read=read_path,
        is_python=True,
    ),
    Option("append", Kind.TEXT, "", flag="--append", help="More kernel arguments.", is_python=True, is_matrix=True),
    *(option for part in PARTS for option in part.options),
    Option(
        "cpu",
        Kind.TEXT,
        flag="--cpu",
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
        help="Clients must prove the machine's token [always on with vhost].",
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
