"""Freezes a guest before it is saved, and thaws one that was restored (docs/reference/protocol.md 4): the host's side.

Blocking, with deadlines: for a thread, or a process that does nothing else.
"""

import os
import time

from vsh.address import Address
from vsh.clock import ROUND_TRIP_LIMITS_NS, WORD_BYTES, exchange
from vsh.errors import VshError
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import Freeze, Thaw

SERVICE = "snapshots"
ENTROPY_BYTES = 64
END = bytes(WORD_BYTES)


class Thawed:
    """What a thaw brought about. wall: the layers, a line each. clock_error_ns: the guest's clock is right to that."""

    __slots__ = ("clock_error_ns", "wall")

    def __init__(self, wall: str, clock_error_ns: int) -> None:
        self.wall = wall
        self.clock_error_ns = clock_error_ns


def make_thaw(hostname: str, token: bytes = b"") -> Thaw:
    """What makes a guest a machine of its own: new randomness and ids. token: what its clients must prove, if any."""
    digits = os.urandom(16).hex()
    # RFC 9562, version 4: as the kernel makes its own.
    variant = "89ab"[int(digits[16], 16) & 3]
    boot_id = f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
    return Thaw(
        hostname=os.fsencode(hostname),
        entropy=os.urandom(ENTROPY_BYTES),
        machine_id=os.urandom(16).hex().encode(),
        boot_id=boot_id.encode(),
        token=token,
    )


def freeze(address: Address, secret: bytes, *, timeout_s: float) -> None:
    """Makes the guest refuse all but a thaw that proves `secret`. Raises VshError."""
    request = make_service_request(freeze=Freeze(secret=secret))
    fd, _, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    os.close(fd)


def thaw(address: Address, request: Thaw, *, timeout_s: float) -> Thawed:
    """Makes a machine of its own of a frozen guest, whose secret is in the address's token file. Raises VshError."""
    deadline_s = time.monotonic() + timeout_s
    fd, rest, wall = open_service(address, make_service_request(thaw=request), timeout_s=timeout_s, name=SERVICE)
    try:
        if rest:
            raise VshError("the guest sent something before the host sent the time")
        error_ns = _set_clock(fd, deadline_s)
        if exchange(fd, END, deadline_s) != END:
            raise VshError("the guest did not confirm its thaw")
    except OSError as error:
        raise VshError(f"the thaw broke off: {error.strerror}") from error
    finally:
        os.close(fd)
    return Thawed(wall, error_ns)


def _set_clock(fd: int, deadline_s: float) -> int:
    """Sets the guest's clock, until it is sure to be right; how far it can be off, in nanoseconds.

    The first words of a restored guest are slow: an emulator has yet to translate what the guest does.
    """
    took_ns = 0
    for limit_ns in ROUND_TRIP_LIMITS_NS:
        start_ns = time.monotonic_ns()
        exchange(fd, time.time_ns().to_bytes(WORD_BYTES, "little"), deadline_s)
        took_ns = time.monotonic_ns() - start_ns
        if took_ns <= limit_ns:
            break
    return took_ns
