"""Ends this guest when its host asks for it (docs/reference/protocol.md 5.5).

Signals pid 1, as `poweroff` of busybox does: a root of a user's own may have no such program. systemd takes a signal
for `systemctl poweroff`, too.
"""

import os

from vshd.session.refusal import RefusalError
from vshd.wire import messages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import PowerOff


def user_of(_power_off: "PowerOff") -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_power_off: "PowerOff") -> str:
    """What the log calls it."""
    return "power-off"


def open_service(_power_off: "PowerOff", _fd: int, around: "Surroundings") -> "PoweringOff":
    """Raises RefusalError where pid 1 may take the signal for another word."""
    if not around.options.power_off:
        raise RefusalError("this vshd was started without --power_off", messages.BAD_REQUEST)
    return PoweringOff(around.options.power_off_signal)


class PoweringOff:
    """Told when it is run: the client has its answer by then."""

    description = b""

    def __init__(self, number: int) -> None:
        self._number = number

    def run(self, fd: int, _rest: bytes, _wakeup: "Wakeup", _log: "Log") -> str:
        """Closes the connection."""
        os.close(fd)
        try:
            os.kill(1, self._number)
        except OSError as error:
            return f"pid 1 could not be told: {error.strerror}"
        return "pid 1 was told"
