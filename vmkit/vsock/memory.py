"""The guest's RAM in this process: shared mappings, and the two kinds of addresses that lead into them.

Ring addresses arrive as addresses of the front-end's own process, descriptor addresses as guest-physical ones
(vhost-user specification, "Memory access"). This module alone checks both against the regions. It returns memoryviews
that cannot reach beyond them.
"""

import mmap
import os
from itertools import pairwise
from typing import Final, NamedTuple

# vhost-user without VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS (VHOST_MEMORY_BASELINE_NREGIONS).
MAX_REGIONS: Final = 8


class MemoryFaultError(Exception):
    """An address or a table of regions is wrong; the text names it."""


class RegionSpec(NamedTuple):
    """One entry of SET_MEM_TABLE: the same bytes in the guest, in the front-end, and in the file that comes with it."""

    guest_address: int
    size_bytes: int
    front_address: int
    mmap_offset: int


class _Region(NamedTuple):
    guest_start: int
    guest_end: int
    front_start: int
    view: memoryview


class MappedMemory:
    """The mapped regions.

    Mappings live as long as a memoryview of them does, so a table can be replaced under running rings.
    """

    __slots__ = ("_last_end", "_last_start", "_last_view", "_regions")

    def __init__(self, regions: list[_Region]) -> None:
        self._regions = regions
        # The region of the previous look-up: nearly always the next one's too.
        self._last_start = self._last_end = 0
        self._last_view = memoryview(b"")

    def find(self, address: int, size_bytes: int) -> memoryview:
        """Returns size_bytes bytes at a guest-physical address, within one region. Raises MemoryFaultError."""
        offset = address - self._last_start
        if offset >= 0 and address + size_bytes <= self._last_end:
            return self._last_view[offset : offset + size_bytes]
        for region in self._regions:
            if region.guest_start <= address < region.guest_end:
                if address + size_bytes > region.guest_end:
                    break
                self._last_start, self._last_end, self._last_view = region.guest_start, region.guest_end, region.view
                offset = address - region.guest_start
                return region.view[offset : offset + size_bytes]
        raise MemoryFaultError(f"no RAM at guest address {address:#x}, {size_bytes} bytes")

    def find_front(self, address: int, size_bytes: int) -> memoryview:
        """Returns size_bytes bytes at a front-end address, within one region. Raises MemoryFaultError."""
        for region in self._regions:
            offset = address - region.front_start
            if offset >= 0 and offset + size_bytes <= len(region.view):
                return region.view[offset : offset + size_bytes]
        raise MemoryFaultError(f"no RAM at front-end address {address:#x}, {size_bytes} bytes")


def map_memory(specs: list[RegionSpec], fds: list[int]) -> MappedMemory:
    """Maps the regions of a table, each with its file; the descriptors stay the caller's. Raises MemoryFaultError."""
    if not 0 < len(specs) <= MAX_REGIONS or len(specs) != len(fds):
        raise MemoryFaultError(f"{len(specs)} memory regions with {len(fds)} descriptors")
    files: dict[tuple[int, int], memoryview] = {}
    regions = []
    for spec, fd in zip(specs, fds, strict=True):
        whole = _map_file(fd, files)
        end = spec.mmap_offset + spec.size_bytes
        if spec.size_bytes == 0 or end > len(whole) or spec.guest_address + spec.size_bytes > 2**64:
            raise MemoryFaultError(
                f"memory region of {spec.size_bytes} bytes at {spec.mmap_offset:#x} does not fit its file"
            )
        view = whole[spec.mmap_offset : end]
        regions.append(_Region(spec.guest_address, spec.guest_address + spec.size_bytes, spec.front_address, view))
    _refuse_overlaps(regions)
    return MappedMemory(regions)


def _map_file(fd: int, files: dict[tuple[int, int], memoryview]) -> memoryview:
    """Maps each file once, as a whole: QEMU's regions are mostly pieces of the same memfd."""
    try:
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        if identity not in files:
            files[identity] = memoryview(mmap.mmap(fd, status.st_size))
    except (OSError, ValueError) as error:
        raise MemoryFaultError(f"cannot map the guest's memory: {error}") from error
    return files[identity]


def _refuse_overlaps(regions: list[_Region]) -> None:
    ordered = sorted(regions, key=lambda region: region.guest_start)
    for lower, upper in pairwise(ordered):
        if upper.guest_start < lower.guest_end:
            raise MemoryFaultError(f"memory regions overlap at guest address {upper.guest_start:#x}")
