"""The guest's clock, from the host (docs/reference/protocol.md 5.4): measures how far it is off, and sets it.

Blocking, with deadlines: for a thread, or a process that does nothing else.
"""

import os
import select
import time

from vsh.address import Address
from vsh.errors import Unanswered, VshError
from vsh.session import open_service
from vsh.transport import remaining_ms
from vshd.wire.client import make_service_request
from vshd.wire.requests import Clock

SERVICE = "clock"
WORD_BYTES = 8
ASK = bytes(WORD_BYTES)
# A word is sent again until it and its answer need no longer than this: the first time, an emulator has yet to
# translate what the guest does. On a busy host the later tries are content with less.
ROUND_TRIP_LIMITS_NS = (10_000_000,) * 8 + (40_000_000,) * 16


class Offset:
    """How far the guest's clock is ahead of the host's, in nanoseconds; and how far off that figure can be."""

    __slots__ = ("ahead_ns", "error_ns")

    def __init__(self, ahead_ns: int, error_ns: int) -> None:
        self.ahead_ns = ahead_ns
        self.error_ns = error_ns


class GuestClock:
    """An open connection to the clock of one guest. Invariant: every word has got its answer, until an error closes it.

    Every method raises VshError.
    """

    def __init__(self, fd: int, name: str, timeout_s: float) -> None:
        """fd: the connection, which this object closes. timeout_s: of each exchange."""
        self._fd = fd
        self._name = name
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Ends the service in the guest."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def measure(self) -> Offset:
        """Asks until an answer comes soon enough; the best measure of all."""
        return min(self._repeat(is_setting=False), key=lambda offset: offset.error_ns)

    def set(self) -> Offset:
        """Sets the clock until a word travels quickly; how far the clock was off before."""
        return self._repeat(is_setting=True)[0]

    def _repeat(self, *, is_setting: bool) -> list[Offset]:
        offsets: list[Offset] = []
        for limit_ns in ROUND_TRIP_LIMITS_NS:
            sent_ns, start_ns = time.time_ns(), time.monotonic_ns()
            word = sent_ns.to_bytes(WORD_BYTES, "little") if is_setting else ASK
            answer = self._exchange(word)
            took_ns = time.monotonic_ns() - start_ns
            offsets.append(Offset(int.from_bytes(answer, "little") - sent_ns - took_ns // 2, took_ns // 2))
            if took_ns <= limit_ns:
                break
        return offsets

    def _exchange(self, word: bytes) -> bytes:
        try:
            return exchange(self._fd, word, time.monotonic() + self._timeout_s)
        except (OSError, VshError) as error:
            # The answer may still come, and would be taken for the next one.
            self.close()
            if isinstance(error, OSError):
                raise VshError(f"the connection to the clock of {self._name} broke: {error.strerror}") from error
            raise


def open_clock(address: Address, *, timeout_s: float) -> GuestClock:
    """Connects to the clock of a guest. timeout_s: of this, and of each later exchange. Raises VshError."""
    request = make_service_request(clock=Clock())
    fd, rest, _ = open_service(address, request, timeout_s=timeout_s, name=SERVICE)
    clock = GuestClock(fd, address.name, timeout_s)
    if rest:
        clock.close()
        raise VshError(f"the vshd of {address.name} sent a time before vsh asked")
    return clock


def exchange(fd: int, word: bytes, deadline_s: float) -> bytes:
    """The guest's answer to a word. Raises VshError, OSError."""
    os.write(fd, word)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    answer = b""
    while len(answer) < WORD_BYTES:
        if not poll.poll(remaining_ms(deadline_s)):
            raise Unanswered("the guest does not answer with its time", hint="it may be paused or stuck")
        piece = os.read(fd, WORD_BYTES - len(answer))
        if not piece:
            raise VshError("the guest closed the connection to its clock", hint="its log says why")
        answer += piece
    return answer
