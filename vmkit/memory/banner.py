"""Finds a kernel's log without the kernel's note, by the log's first line. Pure.

The note exists from 1 s of a boot on, and not in every kernel. The first record of the log is `Linux version ...`, at
the start of the text ring, behind the record's number. The ring's description holds the virtual address of that text.
The kernel's image and its map of memory lie on boundaries of 2 MiB, so the lowest 21 bits of that address are those of
the physical one. A description has small numbers and addresses at known places around it.
"""

import re
import struct
from collections.abc import Iterator
from itertools import islice

from vmkit.memory.guest import Memory, UnreadableError
from vmkit.memory.paging import ShiftedSpace
from vmkit.memory.ring import MAX_COUNT_BITS, MAX_SIZE_BITS, RingPlace

_BANNER = re.compile(rb"Linux version ")
_BANNER_BYTES = len(_BANNER.pattern)
_NUMBER = struct.Struct("<Q")
# DESC0_ID: the first record's number, for a ring of 2^n records, is 2^32 - 2^n.
_NUMBERS_END = 1 << 32
_COUNTS = frozenset(1 << bits for bits in range(1, MAX_COUNT_BITS + 1))
_ALIGNMENT_BITS = 21
_ALIGNMENT_MASK = (1 << _ALIGNMENT_BITS) - 1
# The kernel's half of the addresses.
_KERNEL_START = 0xFFFF_8000_0000_0000
# The kernel's banner is in its image, too. Programs that print versions have the words.
MAX_BANNERS = 1024
MAX_TEXTS = 2
MAX_DESCRIPTIONS = 4096
MAX_RELEASE_BYTES = 64
# struct prb_data_ring: size_bits, padding, data.
_TEXT_RING = struct.Struct("<IIQ")
# struct prb_desc_ring: count_bits, padding, descs, infos, head_id, tail_id. Since 6.6 or so one more word follows.
_RECORD_RING = struct.Struct("<IIQQQQ")
_RECORD_RING_BYTES = (_RECORD_RING.size, _RECORD_RING.size + 8)
_RELEASE = re.compile(rb"[0-9]+\.[0-9]+[\x21-\x7e]*")


def find_rings(memory: Memory) -> Iterator[tuple[ShiftedSpace, RingPlace]]:
    """Yields the rings whose first record is still the kernel's banner, with their address space."""
    for text in islice(_find_texts(memory), MAX_TEXTS):
        yield from _find_descriptions(memory, text)


def find_release(memory: Memory) -> str:
    """The version of the kernel in a memory, by its banner; empty when there is none."""
    for address in islice(memory.search(_BANNER, _BANNER_BYTES), MAX_BANNERS):
        try:
            found = _RELEASE.match(memory.read(address + _BANNER_BYTES, MAX_RELEASE_BYTES))
        except UnreadableError:
            continue
        if found:
            return found[0].decode("ascii")
    return ""


def _find_texts(memory: Memory) -> Iterator[int]:
    """The physical addresses of the blocks that can be a ring's first."""
    for address in islice(memory.search(_BANNER, _BANNER_BYTES), MAX_BANNERS):
        text = address - _NUMBER.size
        if text % _NUMBER.size == 0 and text >= 0:
            (number,) = _NUMBER.unpack(memory.read(text, _NUMBER.size))
            if _NUMBERS_END - number in _COUNTS:
                yield text


def _find_descriptions(memory: Memory, text: int) -> Iterator[tuple[ShiftedSpace, RingPlace]]:
    """The rings whose text is at a physical address."""
    # The first byte stands alone, because a match must not hide one that begins a byte later.
    first, second = (bytes([byte]) for byte in text.to_bytes(8, "little")[:2])
    pattern = re.compile(re.escape(first) + rb"(?=" + re.escape(second) + rb".{4}\xff\xff)", re.DOTALL)
    for found in islice(memory.search(pattern, _NUMBER.size), MAX_DESCRIPTIONS):
        start = found - (_TEXT_RING.size - _NUMBER.size)
        try:
            size_bits, padding, pointer = _TEXT_RING.unpack(memory.read(start, _TEXT_RING.size))
            if not padding and 0 < size_bits <= MAX_SIZE_BITS and _is_same_place(pointer, text):
                yield from _find_records(memory, start, size_bits, pointer, text)
        except UnreadableError:
            continue


def _find_records(
    memory: Memory, description: int, size_bits: int, pointer: int, text: int
) -> Iterator[tuple[ShiftedSpace, RingPlace]]:
    for before in _RECORD_RING_BYTES:
        count_bits, padding, descriptors, infos, head_id, tail_id = _RECORD_RING.unpack(
            memory.read(description - before, _RECORD_RING.size)
        )
        if padding or not 0 < count_bits <= MAX_COUNT_BITS or min(descriptors, infos) < _KERNEL_START:
            continue
        place = RingPlace(count_bits, descriptors, infos, head_id, tail_id, size_bits, pointer)
        yield ShiftedSpace(memory, pointer - text), place


def _is_same_place(pointer: int, text: int) -> bool:
    return pointer >= _KERNEL_START and pointer & _ALIGNMENT_MASK == text & _ALIGNMENT_MASK
