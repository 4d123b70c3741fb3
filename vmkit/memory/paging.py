"""Virtual addresses of the guest's kernel: from the page tables in its memory, or by a known distance. Pure.

x86-64 only. A walk has five steps at most, and each reads one entry, so tables that point to themselves end, too.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

from vmkit.memory.guest import PAGE_BYTES, Memory, UnreadableError
from vmkit.memory.vmcoreinfo import CoreInfo

# Intel SDM 3A, 4.5: the bits of an entry.
_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000
_PAGE_SHIFT, _TABLE_SHIFT = 12, 9
_TABLE_MASK = (1 << _TABLE_SHIFT) - 1
# A page of 1 GiB is in the third table from below, one of 2 MiB in the second.
_LARGE_LEVELS = (2, 3)
_ENTRY = struct.Struct("<Q")
_ADDRESS_BITS = 64
# arch/x86/include/asm/page_64_types.h: __START_KERNEL_map, and the end of the largest kernel image.
_IMAGE_START, _IMAGE_END = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000


class Space(Protocol):
    """Virtual addresses of one kernel."""

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a virtual address. Raises UnreadableError."""


@dataclass(frozen=True, slots=True)
class ShiftedSpace:
    """Virtual addresses that are physical ones plus `distance`."""

    memory: Memory
    distance: int

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a virtual address. Raises UnreadableError."""
        return self.memory.read(address - self.distance, size)


class PagedSpace:
    """Virtual addresses by the kernel's own page tables. Keeps the pages that it has found."""

    def __init__(self, memory: Memory, root: int, levels: int) -> None:
        """root: the physical address of the top table. levels: 4 or 5."""
        self._memory = memory
        self._root = root
        self._levels = levels
        self._pages: dict[int, int] = {}

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a virtual address. Raises UnreadableError."""
        pieces = []
        while size > 0:
            page, inner = divmod(address, PAGE_BYTES)
            length = min(size, PAGE_BYTES - inner)
            if page not in self._pages:
                self._pages[page] = self._walk(page * PAGE_BYTES)
            pieces.append(self._memory.read(self._pages[page] + inner, length))
            address += length
            size -= length
        return b"".join(pieces)

    def _walk(self, address: int) -> int:
        """Returns the physical address of a page."""
        if not 0 <= address < 1 << _ADDRESS_BITS:
            raise UnreadableError(f"{address:#x} is no address")
        table = self._root
        for level in range(self._levels, 0, -1):
            shift = _PAGE_SHIFT + (level - 1) * _TABLE_SHIFT
            index = address >> shift & _TABLE_MASK
            entry = int(_ENTRY.unpack(self._memory.read(table + index * _ENTRY.size, _ENTRY.size))[0])
            if not entry & _PRESENT:
                break
            table = entry & _ADDRESS
            if level == 1:
                return table
            if level in _LARGE_LEVELS and entry & _LARGE:
                inner = (1 << shift) - 1
                return (table & ~inner) + (address & inner)
        raise UnreadableError(f"the kernel has no page at {address:#x}")


def open_space(memory: Memory, info: CoreInfo) -> PagedSpace:
    """The addresses of the kernel that wrote a note. Raises UnreadableError."""
    root = info.find("SYMBOL", "init_top_pgt")
    if not _IMAGE_START <= root < _IMAGE_END:
        raise UnreadableError(f"kernel {info.release} has its page table at {root:#x}")
    levels = 5 if info.values.get("NUMBER(pgtable_l5_enabled)") else 4
    # The image itself lies in one piece: KASLR moves it as a whole, and phys_base is where it is.
    return PagedSpace(memory, root - _IMAGE_START + info.find("NUMBER", "phys_base"), levels)
