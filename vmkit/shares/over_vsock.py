"""A share whose requests come to this process over vsock: what FUSE and 9P have in common."""

from collections.abc import Callable

from vmkit.shares.connection import ask_guest, end_connection
from vmkit.shares.place import SharedPlace
from vmkit.shares.serving import ShareService, Speaker


def connect(machine: str, place: SharedPlace, transport: str, begin: Callable[[], Speaker]) -> "ConnectedVsock":
    """Has the guest mount it. begin: begins to speak the protocol, once the share is served. Raises VshError kinds."""
    fd, rest = ask_guest(machine, place, transport)
    return ConnectedVsock(fd, rest, begin)


class ConnectedVsock:
    """A share that its guest has, or mounts as soon as serve() answers. Owns the connection."""

    def __init__(self, fd: int, rest: bytes, begin: Callable[[], Speaker]) -> None:
        self._fd = fd
        self._rest = rest
        self._begin = begin

    def serve(self, show: Callable[[], None], stop: int, is_stopped: Callable[[], bool]) -> str:
        """Serves to the end; why it ended."""
        return ShareService(self._fd, self._begin()).run(self._rest, stop, is_stopped, show)

    def close(self) -> None:
        """Ends the connection."""
        end_connection(self._fd)
