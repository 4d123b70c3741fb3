"""The core dumps of a guest's programs, from the host (docs/reference/protocol.md 5.7): opens the connection."""

from vsh.address import Address
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import Cores

SERVICE = "core dumps"


def open_cores(address: Address, *, size_max: int, timeout_s: float) -> tuple[int, bytes]:
    """Asks a guest for its cores; returns the connection, which the caller closes, and what has come by it.

    size_max: of a core. timeout_s: of this alone. Raises VshError.
    """
    fd, rest, _ = open_service(
        address, make_service_request(cores=Cores(size=size_max)), timeout_s=timeout_s, name=SERVICE
    )
    return fd, rest
