"""The BTF of a kernel, as far as attaching to one of its functions needs: a function's type id, and where it stands.

BTF is the kernel's description of its own types (Documentation/bpf/btf.rst): a header, type records of 12 bytes with
trailing data by kind, and their names. A type's id is its place in the list, so that finding one means walking all
before it; that is done when the image is built. Pure.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vmkit.errors import BuildError

# A distribution's kernel has 6 MB.
BTF_LIMIT_BYTES = 64 << 20
# linux/btf.h: struct btf_header, and struct btf_type without what follows it.
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MAGIC, _VERSION = 0xEB9F, 1
_FUNC = 12
# What follows a type by its kind: bytes once, bytes for each of its members.
_TRAILING = {
    1: (4, 0),  # INT
    2: (0, 0),  # PTR
    3: (12, 0),  # ARRAY
    4: (0, 12),  # STRUCT
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    7: (0, 0),  # FWD
    8: (0, 0),  # TYPEDEF
    9: (0, 0),  # VOLATILE
    10: (0, 0),  # CONST
    11: (0, 0),  # RESTRICT
    12: (0, 0),  # FUNC
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    16: (0, 0),  # FLOAT
    17: (4, 0),  # DECL_TAG
    18: (0, 0),  # TYPE_TAG
    19: (0, 12),  # ENUM64
}


class BtfError(BuildError):
    """This is no BTF, or ends too soon, or lacks what was looked for."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Bytes of the blob and where they stand: a kernel that has them there is the one that was looked at."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BtfFunction:
    """A function of the kernel: its type id, its record, and its name with the NUL."""

    name: str
    type_id: int
    record: Mark
    text: Mark


@dataclass(frozen=True, slots=True)
class Btf:
    """A blob whose header is known to fit it. Offsets are from the blob's start."""

    data: bytes
    header: Mark
    types_at: int
    types_end: int
    names_at: int
    names_end: int


def parse_btf(data: bytes) -> Btf:
    """Checks the header. Raises BtfError."""
    if len(data) > BTF_LIMIT_BYTES:
        raise BtfError(f"the kernel's BTF is larger than {BTF_LIMIT_BYTES >> 20} MiB")
    if len(data) < _HEADER.size:
        raise BtfError("the kernel's BTF ends inside its header")
    magic, version, _, header_bytes, type_off, type_len, str_off, str_len = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION or header_bytes < _HEADER.size:
        raise BtfError("the kernel's BTF does not begin as BTF does")
    types_at, names_at = header_bytes + type_off, header_bytes + str_off
    if max(types_at + type_len, names_at + str_len) > len(data):
        raise BtfError("the kernel's BTF ends before its header says")
    header = Mark(0, data[: _HEADER.size])
    return Btf(data, header, types_at, types_at + type_len, names_at, names_at + str_len)


def find_functions(btf: Btf, names: Iterable[str]) -> dict[str, BtfFunction]:
    """The functions of these names. Raises BtfError naming one that is not there, or a record that is none."""
    wanted = {_find_name(btf, name): name for name in names}
    found: dict[str, BtfFunction] = {}
    for type_id, (offset, name_off, info) in enumerate(_walk_types(btf), start=1):
        if name_off in wanted and info >> 24 & 0x1F == _FUNC:
            name = wanted[name_off]
            record = Mark(offset, btf.data[offset : offset + _TYPE.size])
            text = Mark(btf.names_at + name_off, name.encode() + b"\0")
            found[name] = BtfFunction(name, type_id, record, text)
            if len(found) == len(wanted):
                return found
    missing = ", ".join(name for name in wanted.values() if name not in found)
    raise BtfError(f"the kernel's BTF knows no function {missing}")


def _find_name(btf: Btf, name: str) -> int:
    """The offset of a name among the names; the first is empty, so that each stands between two NULs."""
    at = btf.data.find(b"\0" + name.encode() + b"\0", btf.names_at, btf.names_end)
    if at < 0:
        raise BtfError(f"the kernel's BTF knows no function {name}")
    return at + 1 - btf.names_at


def _walk_types(btf: Btf) -> Iterator[tuple[int, int, int]]:
    """(offset, name's offset, info) of each record, in the order of their ids, from 1 on."""
    at = btf.types_at
    while at < btf.types_end:
        if at + _TYPE.size > btf.types_end:
            raise BtfError("the kernel's BTF ends inside a type")
        name_off, info, _ = _TYPE.unpack_from(btf.data, at)
        trailing = _TRAILING.get(info >> 24 & 0x1F)
        if trailing is None:
            raise BtfError(f"the kernel's BTF has a type of the unknown kind {info >> 24 & 0x1F}")
        yield at, name_off, info
        at += _TYPE.size + trailing[0] + trailing[1] * (info & 0xFFFF)
    if at != btf.types_end:
        raise BtfError("the kernel's BTF ends inside a type")
