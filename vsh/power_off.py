"""Asks a guest to power off (docs/reference/protocol.md 5.5). Returns before the guest has ended."""

import os

from vsh.address import Address
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import PowerOff

SERVICE = "power-off"


def ask_to_power_off(address: Address, *, timeout_s: float) -> None:
    """Has vshd signal pid 1. Raises VshError, for an older vshd, and for one under another init, too."""
    request = make_service_request(power_off=PowerOff())
    fd, _, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    os.close(fd)
