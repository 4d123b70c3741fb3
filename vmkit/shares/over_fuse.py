"""Shares a folder by FUSE over vsock: the guest's kernel asks, and this process answers."""

from vmkit.shares import over_vsock
from vmkit.shares.place import SharedPlace
from vmkit.shares.server import FuseSpeaker

NAME = "fuse"


def connect(machine: str, place: SharedPlace, folder: int) -> over_vsock.ConnectedVsock:
    """Has the guest mount it. folder: an open directory, which stays the caller's. Raises VshError kinds."""
    return over_vsock.connect(machine, place, NAME, lambda: FuseSpeaker(folder, is_read_only=place.read_only))
