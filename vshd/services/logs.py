"""Hands the host's connection to the process that collects this guest's log (docs/reference/protocol.md 8).

The session's process ends then: the collector has the descriptor, over a socket that only root can reach.
"""

import _socket
import os
import sys

from vshd.carry.records import ID_SIZE, WORD_SIZE
from vshd.session.refusal import RefusalError
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Logs

# The collector reads at once; it starts within this time.
SEND_S = 5.0


def user_of(_logs: "Logs") -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_logs: "Logs") -> str:
    """What the log calls it."""
    return "logs"


def open_service(logs: "Logs", _fd: int, around: "Surroundings") -> "HandingOn":
    """Raises RefusalError where no process collects the log."""
    path = around.options.logs
    if not path:
        raise RefusalError("this vshd was started without --logs", messages.BAD_REQUEST)
    handed = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        handed.settimeout(SEND_S)
        handed.connect(path)
    except OSError as error:
        handed.close()
        reason = f"no process collects the log of this guest: {error.strerror}"
        raise RefusalError(reason, messages.OTHER, error=error.errno or 0) from error
    known = logs.collector if len(logs.collector) == ID_SIZE else bytes(ID_SIZE)
    return HandingOn(handed, known + logs.next.to_bytes(WORD_SIZE, "little"))


class HandingOn:
    """Sends the connection to the collector, and ends."""

    description = b""

    def __init__(self, handed: _socket.socket, asked: bytes) -> None:
        self._handed = handed
        self._asked = asked

    def run(self, fd: int, rest: bytes, _wakeup: "Wakeup", _log: "Log") -> str:
        """Closes this process's copy of the connection. rest: what the host has sent already."""
        rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
        try:
            self._handed.sendmsg([self._asked + rest], [rights])
        except OSError as error:
            return f"the collector does not take the connection: {error.strerror or error}"
        finally:
            os.close(fd)
            self._handed.close()
        return "the collector has the connection"
