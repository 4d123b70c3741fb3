"""The guest's side of a forward, seen from the host: its vsock ports directly, its TCP ports and UNIX sockets through
its vshd (docs/reference/protocol.md 3). Blocking, with deadlines: for a thread, or a process that does nothing else.
"""

import os
import time

from vsh import address as kinds
from vsh.address import Address
from vsh.errors import VshError
from vsh.forward.admissions import TOKEN_SIZE
from vsh.listener import HostListener, listen_for_guest
from vsh.session import FOREVER_S, open_raw, open_service
from vsh.transport import open_transport
from vshd.wire.client import make_service_request
from vshd.wire.requests import Forward, Ports

# A burst of the guest's clients waits there for this loop's next turn.
BACKLOG = 1024


def connect_guest(vm: Address, target: str, *, user: str = "", timeout_s: float) -> tuple[int, bytes]:
    """A connection to a place of the guest: its descriptor, non-blocking, and what was read from it already.

    timeout_s: for connecting and the answer; 0: no limit. Raises VshError.
    """
    if target.startswith("vsock:"):
        port = int(target.removeprefix("vsock:"))
        return open_transport(with_port(vm, port), time.monotonic() + (timeout_s or FOREVER_S)), b""
    request = Forward(connect=os.fsencode(target), user=os.fsencode(user))
    fd, rest, _ = open_raw(vm, request, timeout_s=timeout_s)
    return fd, rest


def open_reports(vm: Address, *, user: str = "", timeout_s: float) -> tuple[int, bytes]:
    """A connection over which the guest reports the ports it listens on: see connect_guest(). Raises VshError."""
    request = make_service_request(ports=Ports(user=os.fsencode(user)))
    fd, rest, _ = open_service(vm, request, timeout_s=timeout_s, name="reports of its ports")
    return fd, rest


class GuestListener:
    """A listener in the guest whose connections arrive at `back`, each with `token` before it. Its life is that of the
    descriptor `control`.
    """

    def __init__(self, control: int, back: HostListener, token: bytes, place: str) -> None:
        """place: where it listens, with the port that the guest's kernel chose."""
        self.control = control
        self.back = back
        self.place = place
        self.token = token

    def close(self) -> None:
        os.close(self.control)
        self.back.close()


def listen_in_guest(vm: Address, place: str, *, user: str = "", timeout_s: float) -> GuestListener:
    """Has the guest's vshd listen. Raises VshError."""
    back = listen_for_guest(vm, None, backlog=BACKLOG)
    try:
        token = os.urandom(TOKEN_SIZE)
        request = Forward(listen=os.fsencode(place), back=os.fsencode(back.place), token=token, user=os.fsencode(user))
        control, _, description = open_raw(vm, request, timeout_s=timeout_s)
    except BaseException:
        back.close()
        raise
    return GuestListener(control, back, token, description or place)


def with_port(vm: Address, port: int) -> Address:
    """Where a vsock port of a machine is. Raises VshError."""
    if vm.kind not in (kinds.HYBRID, kinds.VSOCK):
        raise VshError(f"{vm.name} has no vsock ports: it is a vshd alone", hint="tcp:HOST:PORT and unix:PATH work")
    return Address(vm.kind, name=vm.name, path=vm.path, cid=vm.cid, port=port, is_ours=vm.is_ours)
