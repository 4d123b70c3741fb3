"""Shares a folder by 9P over vsock, for kernels that have it and no FUSE: the guest's kernel asks vmkit.ninep."""

from collections.abc import Callable

from vmkit.ninep.server import NineSpeaker
from vmkit.shares.connection import ask_guest, end_connection
from vmkit.shares.place import SharedPlace
from vmkit.shares.serving import ShareService

NAME = "9p"


def connect(machine: str, place: SharedPlace, folder: int) -> "ConnectedNine":
    """Has the guest begin to mount it. folder: an open directory, which stays the caller's. Raises VshError kinds."""
    fd, rest = ask_guest(machine, place, NAME)
    return ConnectedNine(fd, rest, folder, is_read_only=place.read_only)


class ConnectedNine:
    """A share whose guest mounts it as soon as serve() answers. Owns the connection."""

    def __init__(self, fd: int, rest: bytes, folder: int, *, is_read_only: bool) -> None:
        self._fd = fd
        self._rest = rest
        self._folder = folder
        self._is_read_only = is_read_only

    def serve(self, show: Callable[[], None], stop: int, is_stopped: Callable[[], bool]) -> str:
        """Serves to the end; why it ended."""
        speaker = NineSpeaker(self._folder, is_read_only=self._is_read_only)
        return ShareService(self._fd, speaker).run(self._rest, stop, is_stopped, show)

    def close(self) -> None:
        """Ends the connection."""
        end_connection(self._fd)
