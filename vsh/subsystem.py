"""Subsystems of a guest's vshd (docs/reference/protocol.md 6), such as sftp: as a socket for programs, and as stdio.

Blocking, with deadlines: for a thread, or a process that does nothing else.
"""

import os
import socket

from vsh.address import Address
from vsh.errors import ConnectionLost, UsageError, VshError
from vsh.session import open_service
from vshd.wire.client import make_service_request
from vshd.wire.requests import Subsystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vsh.flags import Options

SERVICE = "subsystems"
# Long enough for a guest under emulation on a busy machine.
CONNECT_TIMEOUT_S = 30.0


def open_subsystem(
    address: Address, name: str, *, user: str = "", timeout_s: float = CONNECT_TIMEOUT_S
) -> socket.socket:
    """A blocking socket that carries the bytes of the subsystem both ways; vshd has accepted it.

    user: as in run(); empty for vshd's default user. timeout_s: for connecting and the answer.

    Raises ExecError whose kind is NOT_FOUND for a subsystem that vshd does not know, and BAD_USER for a user; VshError
    when it refuses for another reason, or is older than subsystems; Unreachable when no vshd answers.
    """
    fd, rest = connect_subsystem(address, name, user=user, timeout_s=timeout_s)
    if rest:
        os.close(fd)
        raise VshError(f"the subsystem {name} of {address.name} sent data before vsh asked")
    os.set_blocking(fd, True)
    return socket.socket(fileno=fd)


def connect_subsystem(address: Address, name: str, *, user: str, timeout_s: float) -> tuple[int, bytes]:
    """The subsystem's connection: its descriptor, non-blocking, and what was read from it already. Raises VshError."""
    request = make_service_request(subsystem=Subsystem(name=os.fsencode(name), user=os.fsencode(user)))
    fd, rest, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    return fd, rest


def check_options(options: "Options") -> None:
    """What --subsystem does not go together with. Raises UsageError."""
    if options.command:
        raise UsageError("--subsystem takes no command", hint="leave out --subsystem or the command")
    if options.local or options.remote or options.dynamic or options.forward_only or options.proxy:
        raise UsageError("--subsystem takes no forward", hint="a second vsh can forward at the same time")


def run_subsystem(options: "Options", where: Address) -> int:
    """--subsystem: stdin and stdout are the subsystem, until it ends. Raises VshError."""
    from vsh.raw import join_stdio_to_server  # noqa: PLC0415 - programs that have a socket need no stdio

    name = options.subsystem
    fd, rest = connect_subsystem(where, name, user=options.user, timeout_s=options.connect_timeout)
    if not join_stdio_to_server(fd, rest):
        from vsh.ending import explain_loss  # noqa: PLC0415 - only after a failure

        lost = ConnectionLost(
            f"the subsystem {name} of {where.name} ended before its input did", hint="the guest's log has the reason"
        )
        explain_loss(lost, where.entry)
        raise lost
    return 0
