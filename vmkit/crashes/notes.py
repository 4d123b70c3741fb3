"""Reads the names of the files that a core dump's program had mapped, from the note NT_FILE. Pure but for one file.

The core is a guest's: no number in it is believed, every loop and every read has a limit.
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

from vmkit.errors import MachineError

# elf.h: the head of a file of 64 bits, and of a segment. Lowest byte first.
_HEAD = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01"
_ET_CORE, _PT_NOTE = 4, 4
# elf.h: NT_FILE, with the name CORE. In it: how many files, the size of a page, three words for each, and the names.
_NOTE = struct.Struct("<III")
_NT_FILE, _CORE = 0x46494C45, b"CORE\0"
_WORD = struct.Struct("<Q")
# A program may map 65530 files, unless its root allows more (vm.max_map_count).
MAX_FILES = 65536
MAX_SEGMENTS = 65536
MAX_NOTES_BYTES = 16 << 20
MAX_NAME_BYTES = 4096


def read_mapped(core: BinaryIO) -> list[bytes]:
    """The names, each once, in the order of their addresses. Raises MachineError for what is no core, OSError."""
    return list(dict.fromkeys(_read_names(_find_note(core))))


def _find_note(core: BinaryIO) -> bytes:
    for notes in _read_notes(core):
        at = 0
        while at + _NOTE.size <= len(notes):
            name_bytes, text_bytes, kind = _NOTE.unpack_from(notes, at)
            name_at = at + _NOTE.size
            text_at = name_at + name_bytes + -name_bytes % 4
            if kind == _NT_FILE and notes[name_at : name_at + name_bytes] == _CORE:
                return notes[text_at : text_at + text_bytes]
            at = text_at + text_bytes + -text_bytes % 4
    raise MachineError("the core does not name its files")


def _read_notes(core: BinaryIO) -> Iterator[bytes]:
    head = core.read(_HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_IDENT):
        raise MachineError("it is no core of a program of 64 bits")
    fields = _HEAD.unpack(head)
    kind, table, size, count = fields[1], fields[5], fields[9], fields[10]
    if kind != _ET_CORE or size != _SEGMENT.size or count > MAX_SEGMENTS:
        raise MachineError("it is no core of a program of 64 bits")
    left_bytes = MAX_NOTES_BYTES
    for number in range(count):
        segment = _read_at(core, table + number * size, size)
        if len(segment) < size:
            return
        kind, _, place, _, _, length, _, _ = _SEGMENT.unpack(segment)
        if kind == _PT_NOTE:
            left_bytes -= length
            if left_bytes < 0:
                raise MachineError("the core has more notes than a program's")
            yield _read_at(core, place, length)


def _read_names(note: bytes) -> Iterator[bytes]:
    if len(note) < 2 * _WORD.size:
        raise MachineError("the core's list of files is cut")
    (count,) = _WORD.unpack_from(note)
    if count > MAX_FILES:
        raise MachineError(f"the core names {count} files")
    at = 2 * _WORD.size + 3 * _WORD.size * count
    for _ in range(count):
        end = note.find(b"\0", at, at + MAX_NAME_BYTES + 1)
        if end < 0:
            # Of a core that was cut.
            return
        yield note[at:end]
        at = end + 1


def _read_at(core: BinaryIO, place: int, size: int) -> bytes:
    if place >= 1 << 62:
        return b""
    core.seek(place)
    return core.read(size)
