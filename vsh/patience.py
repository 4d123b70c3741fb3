"""Writes our own output on a descriptor that another program made non-blocking.

O_NONBLOCK belongs to the open file, which all programs on the terminal or pipe share. A program that sets it and leaves
it (node, asyncio, ssh) makes the others' writes fail when the reader is slow. Python then drops the text without an
error. Here a write waits, as on any other descriptor, and the flag stays as it is.
"""

import io
import os
import select
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class PatientFile(io.FileIO):
    """Invariant: write() writes at least one byte, or raises."""

    def write(self, data: "Any", /) -> int:
        """Waits until the descriptor takes some of data, writes it, and returns how many bytes."""
        while (size := super().write(data)) is None:
            wait_writable(self.fileno())
        return size


def settle_output() -> None:
    """Makes sys.stdout and sys.stderr wait instead of losing text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not os.get_blocking(stream.fileno()):
            setattr(sys, name, _open_patiently(stream))


def write_patiently(fd: int, data: bytes) -> None:
    """Writes all of data. Raises OSError when the reader is gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            wait_writable(fd)


def wait_writable(fd: int) -> None:
    """Waits until fd takes some bytes, or its reader is gone."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.poll()


def _open_patiently(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = io.BufferedWriter(PatientFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
