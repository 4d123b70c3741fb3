"""Announces that vshd listens: to the host, over vsock from a privileged port, and to systemd."""

import _socket
import os

from vshd.carry import vsock
from vshd.flags import ILLEGAL_VALUE_STATUS, FlagError

READY = b"READY=1\n"


def parse_address(text: str) -> tuple[int, int]:
    """Parses `CID:PORT`. Raises FlagError."""
    cid, _, port = text.partition(":")
    if cid.isascii() and cid.isdigit() and port.isascii() and port.isdigit():
        return int(cid), int(port)
    raise FlagError(f"vshd: ERROR: illegal value '{text}' specified for address flag 'ready'", ILLEGAL_VALUE_STATUS)


def tell_host(cid: int, port: int, facts: bytes = b"") -> None:
    """Sends the host the facts and then READY=1. facts: lines `NAME=text`. Raises VsockError."""
    connection = vsock.connect(cid, port, from_privileged=True)
    try:
        connection.sendall(facts + READY)
    except OSError as error:
        raise vsock.VsockError(f"Failed to send READY to vsock {cid}:{port}: {error.strerror}") from error
    finally:
        connection.close()


def tell_systemd() -> None:
    """Notifies systemd (sd_notify(3)) when NOTIFY_SOCKET is set."""
    path = os.environ.pop("NOTIFY_SOCKET", "")
    if not path:
        return
    notify = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        notify.connect("\0" + path[1:] if path.startswith("@") else path)
        notify.send(READY)
    except OSError:
        pass
    finally:
        notify.close()
