"""The door to /dev/vhost-vsock: open it and claim a CID for a guest, before QEMU sees it.

Claiming the CID ourselves turns a clash into a clear error, and no other machine's CID is disturbed.
Source: <linux/vhost.h>.
"""

import errno
import fcntl
import os
import struct
from typing import Protocol

from vmkit.errors import HostError, MachineError

DEVICE = "/dev/vhost-vsock"
# _IOW(VHOST_VIRTIO 0xAF, 0x60, __u64)
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60


class VhostDoor(Protocol):
    """What vmkit needs of vhost-vsock; tests give their own."""

    def open_device(self) -> int:
        """A new descriptor of the device; OSError when there is none or it may not be opened."""

    def set_guest_cid(self, fd: int, cid: int) -> None:
        """Claims cid for the guest behind fd; OSError EADDRINUSE when it is taken."""


class KernelVhostDoor:
    """The real door."""

    def open_device(self) -> int:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)

    def set_guest_cid(self, fd: int, cid: int) -> None:
        fcntl.ioctl(fd, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))


def claim_cid(door: VhostDoor, cid: int) -> int:
    """A descriptor of /dev/vhost-vsock that owns cid for as long as it (or a copy) is open.

    Raises MachineError when the CID is taken, HostError when the device cannot be used.
    """
    try:
        fd = door.open_device()
    except OSError as error:
        raise HostError(
            f"cannot open {DEVICE}: {os.strerror(error.errno or 0)}",
            hint="load it (modprobe vhost_vsock) and join the group that owns it, or use --backend user",
        ) from error
    try:
        door.set_guest_cid(fd, cid)
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EADDRINUSE:
            raise MachineError(
                f"CID {cid} is in use on this host", hint="choose another with --cid, or let vmkit choose"
            ) from error
        raise HostError(f"{DEVICE} refuses CID {cid}: {os.strerror(error.errno or 0)}") from error
    return fd


class VhostClaim:
    """The descriptor of /dev/vhost-vsock that owns a machine's CID. Invariant: `fd` is open between take and close."""

    def __init__(self, door: VhostDoor) -> None:
        self._door = door
        self.fd: int | None = None

    def take(self, cid: int) -> None:
        """Claims cid. Raises MachineError when it is taken, HostError when the device cannot be used."""
        self.fd = claim_cid(self._door, cid)

    def close(self) -> None:
        """Lets go of our descriptor; a process with a copy keeps the CID."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
