"""The process that serves one guest: `python -m vmkit.cros NOTES_FD LISTENING_FD...`, started by the machine's monitor.

It has no files to write and no children to start, and little memory. It ends with the monitor, which it cannot outlive.
"""

import asyncio
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Sequence

from vmkit.cros.serving import serve
from vshd.carry.inherited import settle_signals
from vshd.carry.records import LogRecord

# Some 30 MiB are the interpreter's and grpclib's; the rest of the address space is libraries.
MEMORY_MAX = 512 << 20
OPEN_FILES_MAX = 64
# The guest's lines wait behind everything else of this host.
NICENESS = 10


def main(argv: Sequence[str]) -> int:
    """argv: the numbers of the descriptors."""
    settle_signals()
    _limit()
    notes_fd, *fds = map(int, argv)
    listening = [socket.socket(fileno=fd) for fd in fds]
    with socket.socket(fileno=notes_fd) as notes:
        notes.setblocking(True)

        def note(record: LogRecord) -> None:
            # A monitor that is busy holds up the guest, whose connections are not read meanwhile.
            notes.sendall(record.encode())

        with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
            asyncio.run(serve(listening, note))
    return 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    os.nice(NICENESS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
