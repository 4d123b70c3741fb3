"""The log of a guest, from the host (docs/reference/protocol.md 8): opens the connection that its records come over."""

from vsh.address import Address
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import Logs

SERVICE = "logs"


def open_logs(address: Address, collector: bytes, next_: int, *, timeout_s: float) -> tuple[int, bytes]:
    """Returns the connection, and what of it was read already. Raises VshError.

    collector, next_: the id of the collector that the caller knows, and the number of the record that it lacks; b"" for
    all records that the guest keeps.
    """
    request = make_service_request(logs=Logs(collector=collector, next_=next_))
    fd, rest, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    return fd, rest
