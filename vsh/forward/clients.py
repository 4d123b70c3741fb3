"""Clients of forwards that leave before their turn comes."""

import _socket
import select

from vsh.errors import VshError


class ClientLeft(VshError):  # noqa: N818 - it names what happened
    """The client of a forward has gone: there is no one to open the other side for."""


def is_open(fd: int) -> bool:
    """False once the client has gone and left no bytes. A half-closed connection is open."""
    poll = select.poll()
    poll.register(fd, 0)
    if not poll.poll(0):
        return True
    # A client of a UNIX socket that wrote and closed at once has left bytes for the other side.
    client = _socket.socket(fileno=fd)
    try:
        return bool(client.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT))
    except OSError:
        return False
    finally:
        client.detach()
