"""The kernel's VMCOREINFO note: where its symbols are and how its structures are laid out. Pure.

The kernel keeps it for crash dumps (kernel/vmcore_info.c, from 1 s of a boot on). It is an ELF note at the start of a
page; its text has lines such as `SYMBOL(prb)=ffffffff82e1b7c0` and `OFFSET(printk_info.text_len)=16`.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from vmkit.memory.guest import PAGE_BYTES, Memory, UnreadableError

# <linux/elf.h>, Elf64_Nhdr: n_namesz, n_descsz, n_type.
_HEADER = struct.Struct("<III")
_NAME = b"VMCOREINFO\0\0"
_FIRST_WORD = b"OSRELEASE="
_NEEDLE = _NAME + _FIRST_WORD
# Programs of the guest can write such notes into their memory, and the kernel's may come after them.
MAX_NOTES = 256
_DECIMAL = frozenset(("NUMBER", "OFFSET", "SIZE", "LENGTH"))
MAX_DIGITS = 20


@dataclass(frozen=True, slots=True)
class CoreInfo:
    """What a note holds. release: the kernel's version. values: every number, by the text before its `=`."""

    release: str
    values: dict[str, int]

    def find(self, kind: str, name: str) -> int:
        """Returns a number, such as that of `SYMBOL(prb)`. Raises UnreadableError."""
        try:
            return self.values[f"{kind}({name})"]
        except KeyError as error:
            raise UnreadableError(f"the note of kernel {self.release} has no {kind}({name})") from error


def find_core_infos(memory: Memory) -> Iterator[CoreInfo]:
    """Yields what the notes in a memory hold, the lowest first."""
    for address in islice(memory.search_pages(_NEEDLE, _HEADER.size), MAX_NOTES):
        try:
            name_bytes, text_bytes, _ = _HEADER.unpack(memory.read(address - _HEADER.size, _HEADER.size))
            if name_bytes == len(_NAME) - 1 and text_bytes <= PAGE_BYTES:
                yield parse_core_info(memory.read(address + len(_NAME), text_bytes))
        except UnreadableError:
            continue


def parse_core_info(text: bytes) -> CoreInfo:
    """Reads a note's text. Leaves out the lines that are no numbers."""
    release, values = "", {}
    for line in text.partition(b"\0")[0].decode("ascii", "replace").split("\n"):
        key, equals, value = line.partition("=")
        if key == "OSRELEASE":
            release = value
        elif equals and len(value) <= MAX_DIGITS:
            try:
                values[key] = int(value, 10 if key.partition("(")[0] in _DECIMAL else 16)
            except ValueError:
                continue
    return CoreInfo(release, values)
