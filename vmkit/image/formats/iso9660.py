"""Writes a small ISO 9660 file system: one folder with a few files, as a disk that a guest reads. Pure.

ECMA-119 is the specification; section numbers are its. No extension for long names: Linux shows `USER-DATA.;1` as
`user-data`.
"""

import struct
from collections.abc import Mapping

SECTOR = 2048
# 6.2.1: the first sectors are the system's.
SYSTEM_SECTORS = 16
_DESCRIPTOR, _END, _PATHS_LITTLE, _PATHS_BIG, _FOLDER, _FIRST_FILE = range(SYSTEM_SECTORS, SYSTEM_SECTORS + 6)
# 7.1.1: a file's size is a number of 32 bits. What is made here is far smaller.
MAX_FILE_BYTES = 1 << 24
# 8.4.26.1: a date that is not given.
_NO_DATE = b"0" * 16 + b"\0"
_IS_FOLDER = 2


def render_iso9660(label: str, files: Mapping[str, bytes]) -> bytes:
    """The file system. label: its volume identifier. files: their contents by their names, in lower case, ASCII."""
    places: dict[str, int] = {}
    sector = _FIRST_FILE
    for name in sorted(files):
        if len(files[name]) > MAX_FILE_BYTES:
            raise ValueError(f"{name} has more than {MAX_FILE_BYTES} bytes")
        places[name] = sector
        sector += _count_sectors(files[name])
    folder = _render_record(b"\0", _FOLDER, SECTOR, _IS_FOLDER) + _render_record(b"\1", _FOLDER, SECTOR, _IS_FOLDER)
    for name, place in places.items():
        folder += _render_record(f"{name.upper()}.;1".encode("ascii"), place, len(files[name]), 0)
    if len(folder) > SECTOR:
        raise ValueError(f"{len(files)} files do not fit into one folder of one sector")
    return b"".join(
        (
            bytes(SYSTEM_SECTORS * SECTOR),
            _pad(_render_descriptor(label, sector)),
            # 8.3: the end of the descriptors.
            _pad(b"\xffCD001\x01"),
            # 9.4: the path table has the folder alone, in either order of bytes.
            _pad(struct.pack("<BBIHBx", 1, 0, _FOLDER, 1, 0)),
            _pad(struct.pack(">BBIHBx", 1, 0, _FOLDER, 1, 0)),
            _pad(folder),
            *(_pad(files[name]) for name in places),
        )
    )


def _render_descriptor(label: str, sectors: int) -> bytes:
    """8.4: the primary volume descriptor."""
    return b"".join(
        (
            b"\x01CD001\x01\0",
            b" " * 32,
            label.encode("ascii").ljust(32),
            bytes(8),
            _both32(sectors),
            bytes(32),
            # Of one volume, the first; and the size of a block.
            _both16(1) + _both16(1) + _both16(SECTOR),
            _both32(10),
            struct.pack("<II", _PATHS_LITTLE, 0),
            struct.pack(">II", _PATHS_BIG, 0),
            _render_record(b"\0", _FOLDER, SECTOR, _IS_FOLDER),
            # Who made it, and from what, is left empty.
            b" " * (128 * 4 + 37 * 3),
            _NO_DATE * 4,
            b"\x01",
        )
    )


def _render_record(name: bytes, place: int, size: int, flags: int) -> bytes:
    """9.1: a folder's entry. Its date is 1 January 1980, the same in each file system."""
    date = bytes((80, 1, 1, 0, 0, 0, 0))
    rest = _both32(place) + _both32(size) + date + bytes((flags, 0, 0)) + _both16(1) + bytes((len(name),)) + name
    rest += b"\0" * (len(rest) % 2)
    return bytes((len(rest) + 2, 0)) + rest


def _both16(number: int) -> bytes:
    """7.2.3: little endian, then big."""
    return struct.pack("<H", number) + struct.pack(">H", number)


def _both32(number: int) -> bytes:
    """7.3.3."""
    return struct.pack("<I", number) + struct.pack(">I", number)


def _count_sectors(data: bytes) -> int:
    return -(-len(data) // SECTOR)


def _pad(data: bytes) -> bytes:
    return data.ljust(_count_sectors(data) * SECTOR, b"\0")
