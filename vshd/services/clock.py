"""Sets this guest's clock, and tells the host how far it is off (docs/reference/protocol.md 5.4).

The connection stays open: when the host stops the guest and lets it run again, the time is already on its way.
"""

import os
import select
import time

from vshd.signals import SIGINT, SIGTERM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Clock

# One time, in nanoseconds since 1970, little-endian.
WORD_BYTES = 8
TIME_NS_MAX = (1 << 63) - 1


def user_of(_clock: "Clock") -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_clock: "Clock") -> str:
    """What the log calls it."""
    return "clock"


def open_service(_clock: "Clock", _fd: int, _around: "Surroundings") -> "ClockService":
    """Nothing can be wrong with such a request."""
    return ClockService(KernelClock())


class KernelClock:
    """The clock of this guest, in nanoseconds since 1970."""

    __slots__ = ()

    def read(self) -> int:
        return time.time_ns()

    def set(self, time_ns: int) -> None:
        """Raises OSError."""
        time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


class ClockService:
    """Answers each word of the host with the guest's time. A word that is not 0 is the time from then on."""

    description = b""

    def __init__(self, clock: KernelClock) -> None:
        self._clock = clock

    def run(self, fd: int, rest: bytes, wakeup: "Wakeup", _log: "Log") -> str:
        """Serves until the host closes the connection."""
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(wakeup.fd, select.POLLIN)
        word = rest
        try:
            while len(word) <= WORD_BYTES:
                if len(word) == WORD_BYTES:
                    time_ns = int.from_bytes(word, "little")
                    if time_ns > TIME_NS_MAX:
                        return "ended: the host's time is none"
                    self._answer(fd, time_ns)
                    word = b""
                ready = poll.poll()
                if any(found == wakeup.fd for found, _ in ready):
                    numbers = wakeup.take()
                    if SIGTERM in numbers or SIGINT in numbers:
                        return "ended"
                if any(found == fd for found, _ in ready):
                    piece = os.read(fd, WORD_BYTES + 1 - len(word))
                    if not piece:
                        return "ended"
                    word += piece
            return "ended: the host sent a word before it had an answer"
        except OSError as error:
            return f"ended: {error.strerror}"
        finally:
            os.close(fd)

    def _answer(self, fd: int, time_ns: int) -> None:
        """The time of before: it tells the host how far the clock was off. Raises OSError."""
        before_ns = self._clock.read()
        if time_ns:
            self._clock.set(time_ns)
        os.write(fd, before_ns.to_bytes(WORD_BYTES, "little"))
