"""Shares a folder by 9P over vsock, for kernels that have it and no FUSE: the guest's kernel asks vmkit.ninep."""

from vmkit.ninep.server import NineSpeaker
from vmkit.shares import over_vsock
from vmkit.shares.place import SharedPlace

NAME = "9p"


def connect(machine: str, place: SharedPlace, folder: int) -> over_vsock.ConnectedVsock:
    """Has the guest begin to mount it. folder: an open directory, which stays the caller's. Raises VshError kinds."""
    return over_vsock.connect(machine, place, NAME, lambda: NineSpeaker(folder, is_read_only=place.read_only))
