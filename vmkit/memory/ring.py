"""The kernel's log in its memory: the ring of records that printk writes since Linux 5.10. Pure.

kernel/printk/printk_ringbuffer.c describes it. A record has a descriptor (its number and state, and where its text is),
an entry of the table of infos (time, level, length) and a block of the text ring, which begins with the number again.

The guest may write while it is read, and may write anything at all. So a record counts when its descriptor is the same
after its text was read as before, as in the kernel's own reader. At most MAX_RECORDS records and MAX_TEXT_BYTES of
text are read, the newest first.
"""

import struct
from dataclasses import dataclass

from vmkit.memory.guest import UnreadableError
from vmkit.memory.paging import Space
from vmkit.memory.vmcoreinfo import CoreInfo

# The default ring of Debian's kernels has 4096 records and 128 KiB of text.
MAX_RECORDS = 16384
MAX_TEXT_BYTES = 4 * 1024 * 1024
# log_buf_len= makes larger rings.
MAX_COUNT_BITS, MAX_SIZE_BITS = 26, 31
# enum desc_state, and where it is in a descriptor's state_var.
_COMMITTED, _FINALIZED = 1, 2
_STATE_SHIFT = 62
_ID_MASK = (1 << _STATE_SHIFT) - 1
_WORD = struct.Struct("<Q")
_HALF = struct.Struct("<I")
_LENGTH = struct.Struct("<HBB")
_WORD_MASK = (1 << 64) - 1
# The level is in the upper three bits of the byte that has the flags.
_LEVEL_SHIFT = 5
# A record without text has this bit in its positions (FAILED_LPOS, EMPTY_LINE_LPOS).
_NO_TEXT = 1
# Sizes of structures that a guest names: each of ours has less than a hundred bytes.
MAX_STRUCTURE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PrintkRecord:
    """One call of printk. level and facility as in syslog; the text may have several lines, and any bytes."""

    level: int
    facility: int
    time_ns: int
    text: bytes


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Offsets in a descriptor and in an info, and their sizes. The defaults are those of Linux 5.10 to 6.12."""

    descriptor_bytes: int = 24
    state: int = 0
    begin: int = 8
    next: int = 16
    info_bytes: int = 88
    time: int = 8
    length: int = 16

    def __post_init__(self) -> None:
        ends = (
            (self.descriptor_bytes, max(self.state, self.begin, self.next) + _WORD.size),
            (self.info_bytes, max(self.time + _WORD.size, self.length + _LENGTH.size)),
        )
        starts = (self.state, self.begin, self.next, self.time, self.length)
        if min(starts) < 0 or any(not end <= size <= MAX_STRUCTURE_BYTES for size, end in ends):
            raise UnreadableError("the kernel's records have another layout")


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Where a ring is: virtual addresses, the numbers of the newest and the oldest record, and sizes as powers of 2."""

    count_bits: int
    descriptors: int
    infos: int
    head_id: int
    tail_id: int
    size_bits: int
    text: int

    def __post_init__(self) -> None:
        if not 0 < self.count_bits <= MAX_COUNT_BITS or not 0 < self.size_bits <= MAX_SIZE_BITS:
            raise UnreadableError("the kernel's ring has no such size")


def read_layout(info: CoreInfo) -> RecordLayout:
    """The layout of records by a kernel's note. Raises UnreadableError."""
    counter = info.values.get("OFFSET(atomic_long_t.counter)", 0)
    text = info.find("OFFSET", "prb_desc.text_blk_lpos")
    return RecordLayout(
        descriptor_bytes=info.find("SIZE", "prb_desc"),
        state=info.find("OFFSET", "prb_desc.state_var") + counter,
        begin=text + info.find("OFFSET", "prb_data_blk_lpos.begin"),
        next=text + info.find("OFFSET", "prb_data_blk_lpos.next"),
        info_bytes=info.find("SIZE", "printk_info"),
        time=info.find("OFFSET", "printk_info.ts_nsec"),
        length=info.find("OFFSET", "printk_info.text_len"),
    )


def find_place(space: Space, info: CoreInfo) -> RingPlace:
    """The ring that a kernel uses, by its note. Raises UnreadableError."""
    counter = info.values.get("OFFSET(atomic_long_t.counter)", 0)
    (ring,) = _WORD.unpack(space.read(info.find("SYMBOL", "prb"), _WORD.size))
    records = ring + info.find("OFFSET", "printk_ringbuffer.desc_ring")
    texts = ring + info.find("OFFSET", "printk_ringbuffer.text_data_ring")

    def read(start: int, structure: str, name: str, number: struct.Struct, inner: int = 0) -> int:
        data = space.read(start + info.find("OFFSET", f"{structure}.{name}") + inner, number.size)
        return int(number.unpack(data)[0])

    return RingPlace(
        count_bits=read(records, "prb_desc_ring", "count_bits", _HALF),
        descriptors=read(records, "prb_desc_ring", "descs", _WORD),
        infos=read(records, "prb_desc_ring", "infos", _WORD),
        head_id=read(records, "prb_desc_ring", "head_id", _WORD, counter) & _ID_MASK,
        tail_id=read(records, "prb_desc_ring", "tail_id", _WORD, counter) & _ID_MASK,
        size_bits=read(texts, "prb_data_ring", "size_bits", _HALF),
        text=read(texts, "prb_data_ring", "data", _WORD),
    )


def read_records(space: Space, place: RingPlace, layout: RecordLayout) -> list[PrintkRecord]:
    """The records of a ring, the oldest first. Leaves out those that the guest changes meanwhile.

    Raises UnreadableError when the ring itself is not there.
    """
    ring = _Ring(space, place, layout)
    # Checked here: below, an address that fails is a damaged record.
    ring.read_state(place.head_id)
    count = min((place.head_id - place.tail_id & _ID_MASK) + 1, 1 << place.count_bits, MAX_RECORDS)
    records: list[PrintkRecord] = []
    left_bytes = MAX_TEXT_BYTES
    for distance in range(count):
        try:
            record = ring.read_record(place.head_id - distance & _ID_MASK, left_bytes)
        except UnreadableError:
            continue
        if record is not None:
            records.append(record)
            left_bytes -= len(record.text)
            if left_bytes <= 0:
                break
    records.reverse()
    return records


class _Ring:
    """Reads single records of a ring by their numbers."""

    def __init__(self, space: Space, place: RingPlace, layout: RecordLayout) -> None:
        self._space = space
        self._place = place
        self._layout = layout

    def read_state(self, number: int) -> int:
        """The state_var of the descriptor that a number's record has."""
        return int(_WORD.unpack(self._space.read(self._find_descriptor(number) + self._layout.state, _WORD.size))[0])

    def read_record(self, number: int, limit_bytes: int) -> PrintkRecord | None:
        """A record; None when it is being written or has been overwritten. Raises UnreadableError."""
        layout = self._layout
        descriptor = self._space.read(self._find_descriptor(number), layout.descriptor_bytes)
        (state,) = _WORD.unpack_from(descriptor, layout.state)
        if state & _ID_MASK != number or state >> _STATE_SHIFT not in (_COMMITTED, _FINALIZED):
            return None
        (begin,) = _WORD.unpack_from(descriptor, layout.begin)
        (end,) = _WORD.unpack_from(descriptor, layout.next)
        info = self._space.read(self._place.infos + self._find_index(number) * layout.info_bytes, layout.info_bytes)
        (time_ns,) = _WORD.unpack_from(info, layout.time)
        length, facility, flags = _LENGTH.unpack_from(info, layout.length)
        text = self._read_text(number, begin, end, min(length, limit_bytes))
        if text is None or self.read_state(number) != state:
            return None
        return PrintkRecord(flags >> _LEVEL_SHIFT, facility, time_ns, text)

    def _read_text(self, number: int, begin: int, end: int, length: int) -> bytes | None:
        """None when the block is another record's by now."""
        if begin & _NO_TEXT:
            return b""
        size = 1 << self._place.size_bits
        start, block_bytes = begin % size, (end - begin) & _WORD_MASK
        if block_bytes > size:
            return None
        if start + block_bytes > size:
            # A block that does not fit at the ring's end is at its start.
            start, block_bytes = 0, end % size
        if block_bytes < _WORD.size:
            return None
        block = self._space.read(self._place.text + start, _WORD.size + min(length, block_bytes - _WORD.size))
        (owner,) = _WORD.unpack_from(block)
        return block[_WORD.size :] if owner == number else None

    def _find_descriptor(self, number: int) -> int:
        return self._place.descriptors + self._find_index(number) * self._layout.descriptor_bytes

    def _find_index(self, number: int) -> int:
        return number & (1 << self._place.count_bits) - 1
