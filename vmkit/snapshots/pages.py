"""The pages of a guest's memory in a file: those that are not zero, in runs, each with its checksum.

The file is dense, so it has the same size in every file system and after every copy. Its runs are listed elsewhere
(vmkit.snapshots.store). A checksum finds damage, not an attacker: the files are the user's own. It is taken of the
very bytes that go to the guest, between their way in and their way out.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from vmkit.errors import MachineError

PAGE_BYTES = 4096
# A run is read, checked and written while it is in the processor's cache.
RUN_BYTES = 1 << 20
_ZERO_PAGE, _ZERO_RUN = bytes(PAGE_BYTES), bytes(RUN_BYTES)


class DamagedError(MachineError):
    """A snapshot is not what it was when it was saved."""


@dataclass(frozen=True, slots=True)
class Run:
    """So many bytes of memory from `address` on, and their CRC-32."""

    address: int
    size: int
    checksum: int


def save_pages(memory_fd: int, memory_bytes: int, file_fd: int) -> list[Run]:
    """Writes every page that is not zero. Raises OSError."""
    runs = []
    for start in range(0, memory_bytes, RUN_BYTES):
        data = os.pread(memory_fd, min(RUN_BYTES, memory_bytes - start), start)
        for at, piece in _split(data):
            _write_all(file_fd, piece)
            runs.append(Run(start + at, len(piece), zlib.crc32(piece)))
    return runs


def load_pages(file_fd: int, runs: Sequence[Run], memory_fd: int) -> None:
    """Fills empty memory with the pages of a file. Raises DamagedError for other bytes than were saved, OSError."""
    buffer = memoryview(bytearray(RUN_BYTES))
    position = 0
    for run in runs:
        view = buffer[: run.size]
        if os.preadv(file_fd, [view], position) != run.size or zlib.crc32(view) != run.checksum:
            raise DamagedError(f"the snapshot is damaged: its memory differs at byte {position}")
        if os.pwrite(memory_fd, view, run.address) != run.size:
            raise DamagedError("the host has too little memory for the guest's")
        position += run.size


def check_runs(runs: Sequence[Run], memory_bytes: int, file_bytes: int) -> None:
    """Raises DamagedError for runs that are none of such a memory and such a file."""
    end = 0
    for run in runs:
        is_whole = 0 < run.size <= RUN_BYTES and not (run.size | run.address) % PAGE_BYTES
        if not is_whole or run.address < end or run.address + run.size > memory_bytes:
            raise DamagedError("the snapshot is damaged: its list of pages does not fit")
        end = run.address + run.size
    if sum(run.size for run in runs) != file_bytes:
        raise DamagedError("the snapshot is damaged: its memory has another size")


def _split(data: bytes) -> list[tuple[int, bytes]]:
    """The parts of a run's bytes that have no zero page, with their places."""
    if data == _ZERO_RUN[: len(data)]:
        return []
    parts, start = [], -1
    for at in range(0, len(data), PAGE_BYTES):
        is_zero = data[at : at + PAGE_BYTES] == _ZERO_PAGE
        if is_zero and start >= 0:
            parts.append((start, data[start:at]))
            start = -1
        elif not is_zero and start < 0:
            start = at
    if start >= 0:
        parts.append((start, data[start:]))
    return parts


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
