"""The ways in which a share's requests reach this host: a table, in the order in which vmkit tries them."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vmkit.errors import ConfigError, MachineError
from vmkit.shares.place import SharedPlace
from vsh.errors import ExecError
from vshd.wire import messages


class ConnectedShare(Protocol):
    """A share whose guest has it, or is about to mount it."""

    def serve(self, show: Callable[[], None], stop: int, is_stopped: Callable[[], bool]) -> str:
        """Serves until the guest ends it, or `stop` is readable and is_stopped() says so. Returns why it ended.

        show: is called once, when the guest has the folder.
        """

    def close(self) -> None:
        """Ends the share, and waits a moment for its end in the guest."""


@dataclass(frozen=True, slots=True)
class Transport:
    """One row. title: as people read of it. module: its connect(machine, place, folder) returns a ConnectedShare.

    connect() raises ExecError with the kind UNSUPPORTED where the guest lacks this way. Then the next row is tried.
    shows_memory: the folder's owner can reach the guest's memory. So root's machines have it only by name.
    """

    name: str
    title: str
    module: str
    shows_memory: bool = False


TRANSPORTS = (
    Transport("virtiofs", "virtiofs", "vmkit.shares.over_virtiofs", shows_memory=True),
    Transport("fuse", "FUSE over vsock", "vmkit.shares.over_fuse"),
    Transport("9p", "9P over vsock", "vmkit.ninep.share"),
)
NAMES = tuple(transport.name for transport in TRANSPORTS)


def connect(machine: str, place: SharedPlace, folder: int, by: str) -> tuple[Transport, ConnectedShare]:
    """By the first transport that the guest has. folder: an open directory. by: the only one; "" for any.

    Raises VshError kinds.
    """
    reasons = []
    for transport in find_transports(by):
        if transport.shows_memory and not by and os.geteuid() == 0:
            reasons.append(f"root has {transport.title} only by name: the folder's owner could read the guest's memory")
            continue
        try:
            connected: ConnectedShare = importlib.import_module(transport.module).connect(machine, place, folder)
            return transport, connected
        except ExecError as error:
            if error.kind != messages.UNSUPPORTED:
                raise
            reasons.append(error.brief)
    raise MachineError(f"{machine} cannot have {place.host}: {'; '.join(reasons)}")


def find_transports(by: str) -> tuple[Transport, ...]:
    """Raises ConfigError."""
    found = tuple(transport for transport in TRANSPORTS if by in ("", transport.name))
    if not found:
        raise ConfigError(f"no transport of shares has the name '{by}'", hint=f"known: {', '.join(NAMES)}")
    return found


def render_title(name: str) -> str:
    """What people read of it."""
    return next((transport.title for transport in TRANSPORTS if transport.name == name), name)
