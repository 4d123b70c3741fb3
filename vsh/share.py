"""Mounts a folder of this host in a guest (docs/reference/protocol.md 5.6). The caller then answers its requests.

Blocking, with a deadline: for a process that does nothing else yet.
"""

from vsh.address import Address
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import Share

SERVICE = "shared folders"


def open_share(address: Address, share: Share, *, timeout_s: float) -> tuple[int, bytes]:
    """The share's connection: its descriptor, non-blocking, and what was read from it already. It is mounted.

    Raises ExecError when the guest cannot mount it; VshError for a vshd that is older than shares; Unreachable when no
    vshd answers.
    """
    fd, rest, _ = open_service(address, make_service_request(share=share), timeout_s=timeout_s, name=SERVICE)
    return fd, rest
