"""The sockets of a guest's log, which pid 1 opens before any program runs. Small: pid 1 loads it in every guest."""

import _socket
import os

from vshd.carry.sockets import remove_dead


def open_log_socket(path: str) -> _socket.socket:
    """Listens where the programs of a guest send their lines, such as /dev/log. Raises OSError."""
    return _bind(path, 0o666)


def open_handed(path: str) -> _socket.socket:
    """Listens where vshd hands on the host's connection. Only this user can reach it. Raises OSError."""
    return _bind(path, 0o600)


def _bind(path: str, mode: int) -> _socket.socket:
    remove_dead(path)
    socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        socket.setblocking(False)
        # Before the first line: one that came earlier would have no writer (unix(7)).
        socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        # bind() makes the path's mode of the socket's, less the umask.
        os.fchmod(socket.fileno(), 0o600)
        socket.bind(path)
        if mode != 0o600:
            os.chmod(path, mode)
    except BaseException:
        socket.close()
        raise
    return socket
