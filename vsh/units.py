"""The failed services of a guest, from the host (docs/reference/protocol.md 5.8): opens the connection."""

from vsh.address import Address
from vsh.session import open_service
from vshd.wire import messages
from vshd.wire.client import make_service_request
from vshd.wire.requests import Units

SERVICE = "failed services"
# The kind of the refusal of a guest that has none.
NO_SYSTEMD = messages.NOT_FOUND


def open_units(address: Address, *, timeout_s: float) -> tuple[int, bytes]:
    """Asks a guest for its failed services; returns the connection, which the caller closes, and what has come by it.

    timeout_s: of this alone. Raises VshError.
    """
    request = make_service_request()
    request.units = Units()
    fd, rest, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    return fd, rest
