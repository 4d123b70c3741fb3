"""The SFTP server of a running machine, as a connection for copies."""

from vmkit.copy.sides import SftpPeer
from vmkit.errors import MachineError
from vmkit.machine.running import pick_entry
from vsh.address import address_of
from vsh.errors import ExecError
from vsh.subsystem import open_subsystem

SUBSYSTEM = "sftp"


def open_sftp(machine: str, user: str = "") -> SftpPeer:
    """Connects to the SFTP server of a machine. machine: its name or CID; empty for the only one. Raises VshError."""
    entry = pick_entry(machine or None)
    try:
        return SftpPeer(entry.name, open_subsystem(address_of(entry), SUBSYSTEM, user=user))
    except ExecError as error:
        # Its status is that of a command, and this is none.
        raise MachineError(error.brief) from error
