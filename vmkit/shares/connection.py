"""The connection of a share: begun by a request to the guest's vshd, and ended when the guest has let go."""

import contextlib
import os
import select
import socket
import time

from vmkit.shares.place import SharedPlace
from vsh.address import find_by_name
from vsh.share import open_share
from vsh.transport import remaining_ms
from vshd.wire.requests import Share

# The guest's answer; a guest under emulation may be busy.
MOUNT_TIMEOUT_S = 30.0
# A guest that hangs or is paused does not hold up the end.
UNMOUNT_TIMEOUT_S = 2.0
PIECE_BYTES = 1 << 16


def ask_guest(machine: str, place: SharedPlace, by: str, source: str = "") -> tuple[int, bytes]:
    """Has the guest's vshd mount a share: its connection, and what was read from it already. Raises VshError kinds.

    source: what the guest's list of mounts calls it; "": the folder of this host.
    """
    wanted = Share(
        path=os.fsencode(place.guest),
        source=os.fsencode(source or place.host),
        read_only=place.read_only,
        by=by.encode(),
    )
    return open_share(find_by_name(machine), wanted, timeout_s=MOUNT_TIMEOUT_S)


def end_connection(fd: int) -> None:
    """Waits for the guest's end as well, and closes the connection."""
    try:
        await_unmount(fd)
    finally:
        os.close(fd)


def await_unmount(fd: int) -> None:
    """Ends the connection, and waits for its end in the guest: then the place there is free for the next share."""
    deadline_s = time.monotonic() + UNMOUNT_TIMEOUT_S
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    with socket.socket(fileno=os.dup(fd)) as connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        # Whatever a guest sends, the time is limited.
        while (left_ms := remaining_ms(deadline_s)) and poll.poll(left_ms) and connection.recv(PIECE_BYTES):
            pass
