"""The sockets of a guest's log, which pid 1 opens before any program runs. Small: pid 1 loads it in every guest."""

import _socket
import os

from vshd.carry.sockets import remove_dead

# One journal connects.
BACKLOG = 4


def open_log_socket(path: str) -> _socket.socket:
    """Listens where the programs of a guest send their lines, such as /dev/log. Raises OSError."""
    return _bind(path, 0o666)


def open_lines_socket(path: str) -> _socket.socket:
    """Listens where the journal sends each line on, as to a syslog daemon. Only root can reach it. Raises OSError."""
    return _bind(path, 0o600)


def open_stream_socket(path: str) -> _socket.socket:
    """Listens where the journal connects to, and sends its records. Only root can reach it. Raises OSError."""
    socket = _bind(path, 0o600, _socket.SOCK_STREAM)
    socket.listen(BACKLOG)
    return socket


def open_handed(path: str) -> _socket.socket:
    """Listens where vshd hands on the host's connection. Only this user can reach it. Raises OSError."""
    return _bind(path, 0o600)


def _bind(path: str, mode: int, kind: int = _socket.SOCK_DGRAM) -> _socket.socket:
    remove_dead(path)
    socket = _socket.socket(_socket.AF_UNIX, kind)
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
