"""Subsystems (docs/reference/protocol.md 6): services that a client asks for by name, as ssh's clients do.

A row's module is loaded when the row is asked for. `budget` is how many modules that may bring in.

To add a subsystem: a module with `open_subsystem(home)`, and a row.
"""

import os

from vshd.session.refusal import RefusalError
from vshd.wire import messages
from vshd.wire.requests import Subsystem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.services.table import Handed, Surroundings

# Bytes of a name that the log and the refusal show.
NAME_SHOWN_MAX = 64


class Row:
    """One row of SUBSYSTEMS."""

    __slots__ = ("budget", "module", "name")

    def __init__(self, name: bytes, module: str, budget: int) -> None:
        self.name = name
        self.module = module
        self.budget = budget


SUBSYSTEMS = (Row(b"sftp", "vshd.services.sftp.serving", 11),)


def user_of(subsystem: Subsystem) -> bytes:
    """The user that the client asks for. The request's own user is a stub, for servers that know no subsystems."""
    return subsystem.user


def describe(subsystem: Subsystem) -> str:
    """What the log calls it."""
    return f"subsystem {os.fsdecode(subsystem.name[:NAME_SHOWN_MAX])}"


def open_service(subsystem: Subsystem, _fd: int, around: "Surroundings") -> "Handed":
    """Opens the subsystem of this name. Raises RefusalError."""
    for row in SUBSYSTEMS:
        if row.name == subsystem.name:
            module = __import__(row.module, fromlist=("open_subsystem",))
            handed: Handed = module.open_subsystem(around.home)
            return handed
    name = subsystem.name[:NAME_SHOWN_MAX]
    raise RefusalError(f"no subsystem has the name {os.fsdecode(name)!r}", messages.NOT_FOUND, subject=name)
