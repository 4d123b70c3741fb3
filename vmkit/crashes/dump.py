"""Takes the dump of a guest's memory that QEMU writes to a pipe, and makes a file of it with a ceiling.

QEMU is believed nothing: whatever it writes, the file has at most `max_bytes` bytes of data. ELF comes as it is.
kdump comes in makedumpfile's flattened form (QEMU, dump/dump.c), which only some readers know: a header, and then
pieces, each behind its place in the file. Here it becomes the file that those pieces make.
"""

import os
import struct

from vmkit.crashes.record import DumpFormat
from vmkit.errors import MachineError

# A guest has touched few of its pages; the others become holes.
PAGE_BYTES = 4096
_EMPTY_PAGE = bytes(PAGE_BYTES)
# makedumpfile.h: struct makedumpfile_header in MAX_SIZE_MDF_HEADER bytes, struct makedumpfile_data_header.
_FLAT_SIGNATURE = b"makedumpfile\0\0\0\0"
_FLAT_HEADER_BYTES = 4096
_PIECE = struct.Struct(">qq")
_END = -1
# Of a hole in the file, which costs no room. A guest's memory has less.
MAX_PLACE_BYTES = 1 << 44


class SparseFile:
    """A file of pieces. Invariant: at most max_bytes of data were written; pages of zeros are holes."""

    def __init__(self, fd: int, max_bytes: int) -> None:
        """fd: the file, which the caller closes."""
        self._fd = fd
        self._max_bytes = max_bytes
        self._data_bytes = 0
        # That of the file, with its holes.
        self.size_bytes = 0

    def write(self, at: int, data: bytes | memoryview) -> None:
        """Writes a piece at its place. Raises MachineError, OSError."""
        if not 0 <= at <= MAX_PLACE_BYTES:
            raise MachineError(f"QEMU's dump has a piece at {at:#x}")
        view = memoryview(data)
        start = 0
        while start < len(view):
            # Up to the end of a page of the file, so that a hole is a whole one.
            end = start + PAGE_BYTES - (at + start) % PAGE_BYTES
            if end - start == PAGE_BYTES and view[start:end] == _EMPTY_PAGE:
                start = end
                continue
            run = start
            while end < len(view) and view[end : end + PAGE_BYTES] != _EMPTY_PAGE:
                end += PAGE_BYTES
            end = min(end, len(view))
            self._put(at + run, view[run:end])
            start = end
        self.size_bytes = max(self.size_bytes, at + len(view))

    def finish(self) -> None:
        """Gives the file its size: its end may be a hole. Raises OSError."""
        os.ftruncate(self._fd, self.size_bytes)

    def _put(self, at: int, data: memoryview) -> None:
        self._data_bytes += len(data)
        if self._data_bytes > self._max_bytes:
            raise MachineError(
                f"the dump is larger than {self._max_bytes >> 20} MiB", hint="--vmcore=kdump compresses it"
            )
        while data:
            written = os.pwrite(self._fd, data, at)
            at += written
            data = data[written:]


class ElfDump:
    """An ELF file, as it comes."""

    def __init__(self, file: SparseFile) -> None:
        self._file = file
        self._at = 0

    def feed(self, data: bytes) -> None:
        """Takes the next bytes. Raises MachineError, OSError."""
        self._file.write(self._at, data)
        self._at += len(data)

    def finish(self) -> None:
        """QEMU has written all. Raises MachineError, OSError."""
        self._file.finish()


class FlatDump:
    """A flattened kdump. Invariant: `_left` bytes of the present piece are still to come, for the place `_at`."""

    def __init__(self, file: SparseFile) -> None:
        self._file = file
        self._rest = b""
        self._left = 0
        self._at = 0
        self._has_header = False
        self._is_whole = False

    def feed(self, data: bytes) -> None:
        """Takes the next bytes. Raises MachineError, OSError."""
        data = self._rest + data if self._rest else data
        at = 0
        while not self._is_whole:
            if self._left:
                piece = memoryview(data)[at : at + self._left]
                if not piece:
                    break
                self._file.write(self._at, piece)
                self._at += len(piece)
                self._left -= len(piece)
                at += len(piece)
                continue
            wanted = _PIECE.size if self._has_header else _FLAT_HEADER_BYTES
            if len(data) - at < wanted:
                break
            self._take_header(data[at : at + wanted])
            at += wanted
        self._rest = b"" if self._is_whole else data[at:]

    def finish(self) -> None:
        """QEMU has written all. Raises MachineError, OSError."""
        if not self._is_whole:
            raise MachineError("QEMU's dump ends before its end mark")
        self._file.finish()

    def _take_header(self, header: bytes) -> None:
        if not self._has_header:
            if not header.startswith(_FLAT_SIGNATURE):
                raise MachineError("QEMU's dump is no kdump in makedumpfile's form")
            self._has_header = True
            return
        self._at, self._left = _PIECE.unpack(header)
        self._is_whole = self._at == _END and self._left == _END
        if not self._is_whole and self._left < 0:
            raise MachineError(f"QEMU's dump has a piece of {self._left} bytes")


def open_dump(format_: DumpFormat, file: SparseFile) -> ElfDump | FlatDump:
    """Reads one format."""
    return ElfDump(file) if format_ is DumpFormat.ELF else FlatDump(file)
