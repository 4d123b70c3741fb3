"""What an image build asks an ELF file: the libraries it needs, a module's words about itself, a kernel's PVH entry
and its BTF; and a module without its debug sections.

Layouts are those of elf.h (Elf64_Ehdr, Elf64_Shdr, Elf64_Dyn); only 64-bit files are read, others have no answers. The
numbers of a program for s390x begin with their highest byte.
"""

import struct
from typing import NamedTuple

# ELFCLASS64 with ELFDATA2LSB, ELFDATA2MSB: and how struct calls these orders.
_IDENTS = {b"\x7fELF\x02\x01": "<", b"\x7fELF\x02\x02": ">"}
_IDENT_BYTES = 6
_EHDR, _SHDR, _DYN, _NHDR = "16sHHIQQQIHHHHHH", "IIQQQQIIQQ", "qQ", "III"
_EHDR_BYTES = struct.calcsize("<" + _EHDR)
_SHT_DYNAMIC, _SHT_NOTE = 6, 7
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_SHT_NULL, _SHT_NOBITS = 0, 8
# Where Elf64_Ehdr has e_shoff.
_PLACE, _PLACE_AT = "Q", 40
# DWARF and its relocations, for these alone are large.
_DEBUG = (".debug_", ".rela.debug_")
# A module's sections have at most 4096 (a page); the field could claim more.
_ALIGNMENT_LIMIT = 4096
# scripts/sign-file.c
_SIGNED = b"~Module signature appended~\n"
_DT_NEEDED, _DT_SONAME = 1, 14
# A kernel module has some fifty sections; the field could claim 65,535.
_SECTION_LIMIT = 4096
# The longest .modinfo of Debian's has tens of kilobytes, for the module's aliases.
_MODINFO_LIMIT_BYTES = 4 << 20
# Of the name of a section or library.
_NAME_LIMIT_BYTES = 4096


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def is_elf(data: bytes) -> bool:
    return data[:_IDENT_BYTES] in _IDENTS and len(data) >= _EHDR_BYTES


def _layout(data: bytes, form: str) -> struct.Struct:
    """The layout of a structure in the order of bytes of this file."""
    return struct.Struct(_IDENTS[data[:_IDENT_BYTES]] + form)


def read_needed(data: bytes) -> tuple[str, ...]:
    """The sonames of a program's or library's DT_NEEDED entries; none for a static one."""
    return _read_dynamic(data, _DT_NEEDED)


def read_soname(data: bytes) -> str:
    """The name that programs have a library by; "" where it has none."""
    return next(iter(_read_dynamic(data, _DT_SONAME)), "")


def _read_dynamic(data: bytes, wanted: int) -> tuple[str, ...]:
    """The texts of the dynamic entries of one tag."""
    sections = _read_sections(data)
    for section in sections:
        if section.kind != _SHT_DYNAMIC or section.link >= len(sections):
            continue
        names = _content(data, sections[section.link])
        entries = _content(data, section)
        layout = _layout(data, _DYN)
        usable = len(entries) - len(entries) % layout.size
        return tuple(_text(names, value) for tag, value in layout.iter_unpack(entries[:usable]) if tag == wanted)
    return ()


def has_pvh_entry(data: bytes) -> bool:
    """True for a kernel that can be started uncompressed.

    It carries XEN_ELFNOTE_PHYS32_ENTRY (xen/interface/elfnote.h).
    """
    for section in _read_sections(data):
        if section.kind != _SHT_NOTE:
            continue
        notes, at, layout = _content(data, section), 0, _layout(data, _NHDR)
        while at + layout.size <= len(notes):
            name_size, value_size, kind = layout.unpack_from(notes, at)
            name_at = at + layout.size
            if notes[name_at : name_at + name_size] == b"Xen\0" and kind == _XEN_ELFNOTE_PHYS32_ENTRY:
                return True
            at = name_at + _align4(name_size) + _align4(value_size)
    return False


def _align4(size: int) -> int:
    return size + -size % 4


def read_section(data: bytes, name: str) -> bytes:
    """The content of a section, empty when there is none of that name."""
    sections = _read_sections(data)
    if not sections:
        return b""
    names = _content(data, sections[_layout(data, _EHDR).unpack_from(data)[13]])
    return next((_content(data, section) for section in sections if _text(names, section.name) == name), b"")


def read_modinfo(data: bytes) -> dict[str, tuple[str, ...]]:
    """A kernel module's .modinfo: the values of each key, in their order."""
    values: dict[str, list[str]] = {}
    for item in read_section(data, ".modinfo")[:_MODINFO_LIMIT_BYTES].split(b"\0"):
        key, equals, value = item.decode("latin-1").partition("=")
        if equals:
            values.setdefault(key, []).append(value)
    return {key: tuple(found) for key, found in values.items()}


def drop_debug(data: bytes) -> bytes:
    """A kernel module without what only debuggers read, which is most of it in a build tree.

    The sections keep their numbers, so that nothing that names one has to change: those that go become empty
    (SHT_NULL). A signed module stays as it is, for its signature covers every byte. So does one that would become
    larger, for its sections overlap.
    """
    sections = _read_sections(data)
    if not sections or data.endswith(_SIGNED):
        return data
    names = _content(data, sections[_layout(data, _EHDR).unpack_from(data)[13]])
    is_dropped = [_text(names, section.name).startswith(_DEBUG) for section in sections]
    if not any(is_dropped) or max(section.alignment for section in sections) > _ALIGNMENT_LIMIT:
        return data
    out, table, layout = bytearray(data[:_EHDR_BYTES]), bytearray(), _layout(data, _SHDR)
    for section, dropped in zip(sections, is_dropped, strict=True):
        kept = section._replace(kind=_SHT_NULL, flags=0, size=0, offset=0) if dropped else section
        if kept.kind not in (_SHT_NULL, _SHT_NOBITS):
            out += bytes(-len(out) % max(kept.alignment, 1))
            kept, content = kept._replace(offset=len(out)), _content(data, section)
            out += content
            if len(out) > len(data):
                return data
        table += layout.pack(*kept)
    out += bytes(-len(out) % 8)
    _layout(data, _PLACE).pack_into(out, _PLACE_AT, len(out))
    return bytes(out + table) if len(out) + len(table) <= len(data) else data


def _read_sections(data: bytes) -> list[_Section]:
    if not is_elf(data):
        return []
    header, layout = _layout(data, _EHDR).unpack_from(data), _layout(data, _SHDR)
    offset, count, names_at = header[6], header[12], header[13]
    if count > _SECTION_LIMIT or offset + count * layout.size > len(data) or names_at >= max(count, 1):
        return []
    return [_Section(*layout.unpack_from(data, offset + index * layout.size)) for index in range(count)]


def _content(data: bytes, section: _Section) -> bytes:
    return data[section.offset : section.offset + section.size]


def _text(names: bytes, at: int) -> str:
    return names[at : at + _NAME_LIMIT_BYTES].partition(b"\0")[0].decode("latin-1")
