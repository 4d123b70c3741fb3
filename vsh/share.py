"""Mounts a folder of this host in a guest (docs/reference/protocol.md 5.6). The caller then answers its requests.

Blocking, with a deadline: for a process that does nothing else yet.
"""

import os

from vsh.address import Address
from vsh.errors import ExecError
from vsh.session import open_service
from vshd.wire import messages
from vshd.wire.client import make_service_request
from vshd.wire.requests import Share

SERVICE = "shared folders"


def open_share(address: Address, share: Share, *, timeout_s: float) -> tuple[int, bytes]:
    """The share's connection: its descriptor, non-blocking, and what was read from it already. It is mounted.

    Raises ExecError when the guest cannot mount it, with the kind UNSUPPORTED where it lacks the way `share.by`. Raises
    VshError for a vshd that is older than shares, and Unreachable when no vshd answers.
    """
    request = make_service_request(share=share)
    fd, rest, description = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    if share.by and os.fsencode(description) != share.by:
        os.close(fd)
        by = os.fsdecode(share.by)
        # It does not know the field.
        raise ExecError(f"the guest's vshd is older than shares by {by}", kind=messages.UNSUPPORTED)
    return fd, rest
