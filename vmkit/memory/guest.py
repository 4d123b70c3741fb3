"""A guest's memory as a file: bytes at a physical address, and a search. The one module here that reads a descriptor.

It never maps the file: a mapped hole would become a page of memory, and a file that is cut would end the process with
SIGBUS. pread(2) does neither, and what it returned does not change any more.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import Protocol

GIB = 1 << 30
PAGE_BYTES = 4096
# QEMU, hw/i386/pc_q35.c: a guest with so much memory has 2 GiB below the hole for devices, and the rest from 4 GiB on.
SPLIT_FROM_BYTES = 0xB000_0000
LOW_BYTES = 2 * GIB
HIGH_START = 4 * GIB
# A guest may have touched every page that it has. One search reads no more than this: some seconds of work each.
MAX_SEARCH_BYTES = 1 * GIB
MAX_PAGES_SEARCH_BYTES = 16 * GIB
CHUNK_BYTES = 1 << 17
# A full ring takes 6 reads for each of its records, and a hostile one of 64 KiB a record 17: one second of work.
MAX_READS = 400_000


class UnreadableError(Exception):
    """The memory has no such address, or holds something else at it. Never leaves this package."""


class SpentError(Exception):
    """A memory has taken more reads than an honest one can. Never leaves this package."""


class Memory(Protocol):
    """A guest's physical memory. The guest may write to it at any moment."""

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a physical address. Raises UnreadableError."""

    def search(self, pattern: re.Pattern[bytes], size: int) -> Iterator[int]:
        """Yields the physical addresses where a pattern of at most so many bytes matches, the lowest first."""

    def search_pages(self, needle: bytes, offset: int) -> Iterator[int]:
        """Yields the addresses of a text that is so many bytes behind the start of a page."""


class MemoryFile:
    """The memory of a q35 machine in a file of QEMU's. The caller owns the descriptor."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._size_bytes = size_bytes
        self._low_bytes = LOW_BYTES if size_bytes >= SPLIT_FROM_BYTES else size_bytes

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a physical address. Raises UnreadableError."""
        offset, limit = address, self._low_bytes
        if address >= HIGH_START:
            offset, limit = address - HIGH_START + self._low_bytes, self._size_bytes
        if address < 0 or size < 0 or offset + size > limit:
            raise UnreadableError(f"the guest has no memory at {address:#x}")
        data = os.pread(self._fd, size, offset)
        if len(data) != size:
            raise UnreadableError(f"the guest's memory ends before {address:#x}")
        return data

    def search(self, pattern: re.Pattern[bytes], size: int) -> Iterator[int]:
        """Yields the physical addresses where a pattern matches. Skips pages that nothing has written to."""
        for at, data in self._read_chunks(size - 1, MAX_SEARCH_BYTES):
            for found in pattern.finditer(data):
                # The rest belongs to the next chunk.
                if found.start() < CHUNK_BYTES:
                    yield self._find_address(at + found.start())

    def search_pages(self, needle: bytes, offset: int) -> Iterator[int]:
        """Yields the addresses of a text that is so many bytes behind the start of a page, and within it."""
        for at, data in self._read_chunks(0, MAX_PAGES_SEARCH_BYTES):
            # A byte of each page: three times as fast as a search of everything.
            firsts = data[offset::PAGE_BYTES]
            page = firsts.find(needle[:1])
            while page >= 0:
                start = page * PAGE_BYTES + offset
                if data.startswith(needle, start):
                    yield self._find_address(at + start)
                page = firsts.find(needle[:1], page + 1)

    def _read_chunks(self, overlap_bytes: int, limit_bytes: int) -> Iterator[tuple[int, bytearray]]:
        """Yields all that is in the file, each chunk with the start of the next. A chunk is good until the next."""
        # One buffer for all: a new one for each chunk would take twice the time.
        buffer = bytearray(CHUNK_BYTES + overlap_bytes)
        left_bytes = limit_bytes
        for start, end in self._list_runs():
            # A text may lie across two chunks, and never across the hole between 2 and 4 GiB.
            for at in range(start, end, CHUNK_BYTES):
                length = os.preadv(self._fd, [memoryview(buffer)[: end - at]], at)
                yield at, buffer if length == len(buffer) else buffer[:length]
                left_bytes -= CHUNK_BYTES
                if left_bytes <= 0:
                    return

    def _list_runs(self) -> Iterator[tuple[int, int]]:
        """The parts of the file that have pages, cut at the end of the low memory."""
        at = 0
        while at < self._size_bytes:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = min(os.lseek(self._fd, start, os.SEEK_HOLE), self._size_bytes)
            if start < self._low_bytes < end:
                yield start, self._low_bytes
                start = self._low_bytes
            yield start, end
            at = max(end, at + PAGE_BYTES)

    def _find_address(self, offset: int) -> int:
        return offset if offset < self._low_bytes else offset - self._low_bytes + HIGH_START


class LimitedMemory:
    """A memory that allows MAX_READS reads, so that what a guest wrote cannot make its reader work for long."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._left = MAX_READS
        self.search = memory.search
        self.search_pages = memory.search_pages

    def read(self, address: int, size: int) -> bytes:
        """Returns the bytes at a physical address. Raises UnreadableError, SpentError."""
        self._left -= 1
        if self._left < 0:
            raise SpentError
        return self._memory.read(address, size)
