"""The SFTP server of a running machine, as a connection for copies."""

from vmkit.copy.sides import SftpPeer
from vmkit.errors import MachineError
from vmkit.machine.running import pick_entry
from vsh.address import address_of
from vsh.ending import explain_loss
from vsh.errors import ExecError
from vsh.registry import Entry
from vsh.subsystem import open_subsystem

SUBSYSTEM = "sftp"


def open_sftp(machine: str, user: str = "") -> SftpPeer:
    """Connects to the SFTP server of a machine. machine: its name or CID; empty for the only one. Raises VshError."""
    return connect_sftp(pick_entry(machine or None), user)


def connect_sftp(entry: Entry, user: str) -> SftpPeer:
    """Connects to the SFTP server of this machine. Raises VshError."""
    try:
        sock = open_subsystem(address_of(entry), SUBSYSTEM, user=user)
    except ExecError as error:
        # Its status is that of a command, and this is none.
        raise MachineError(error.brief) from error
    return SftpPeer(entry.name, sock, lambda error: explain_loss(error, entry))
