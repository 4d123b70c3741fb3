"""Connections that come back from a guest, until each has shown its listener's token.

Every program of the guest can connect to our end of a listening forward (-R). Its vshd sends the token at once; others
wait here, where they cost a descriptor each, for a limited time, and make room for later connections.
"""

import hmac
import os
import time
from collections.abc import Callable

from vshd.carry.bridge import Pairs

# What keeps other programs of the guest from using our end of a listening forward.
TOKEN_SIZE = 32
# Of one listener. The oldest makes room: vshd needs a moment only, and those who know no token must not keep it out.
WAITING_MAX = 64
TIMEOUT_S = 10.0


class Admissions:
    """Invariant: every descriptor in `_waiting` is ours and watched, in the order of its deadline."""

    def __init__(self, pairs: Pairs, token: bytes, admit: Callable[[int], None], refuse: Callable[[str], None]) -> None:
        """admit gets a descriptor whose token is right, refuse a reason for each that was closed."""
        self._pairs = pairs
        self._token = token
        self._admit = admit
        self._refuse = refuse
        self._waiting: dict[int, tuple[bytes, float]] = {}

    def add(self, fd: int) -> None:
        """One more, which is ours from here on."""
        if len(self._waiting) == WAITING_MAX:
            self._drop(next(iter(self._waiting)), "it showed no token, and others came")
        os.set_blocking(fd, False)
        self._waiting[fd] = (b"", time.monotonic() + TIMEOUT_S)
        self._pairs.watch(fd, lambda: self._read(fd))
        self._read(fd)

    def tend(self) -> float:
        """Drops those whose time is over; the seconds to the next such moment."""
        now_s = time.monotonic()
        while self._waiting:
            fd, (_, deadline_s) = next(iter(self._waiting.items()))
            if deadline_s > now_s:
                return deadline_s - now_s
            self._drop(fd, f"it showed no token within {TIMEOUT_S:g} s")
        return TIMEOUT_S

    def close(self) -> None:
        """Drops all, without a word."""
        for fd in list(self._waiting):
            self._forget(fd)
            os.close(fd)

    def _read(self, fd: int) -> None:
        data, deadline_s = self._waiting[fd]
        try:
            more = os.read(fd, TOKEN_SIZE - len(data))
        except BlockingIOError:
            return
        except OSError:
            more = b""
        data += more
        if not more:
            self._drop(fd, "it ended before it showed a token")
        elif len(data) < TOKEN_SIZE:
            self._waiting[fd] = (data, deadline_s)
        elif hmac.compare_digest(data, self._token):
            self._forget(fd)
            self._admit(fd)
        else:
            self._drop(fd, "it is not from the guest's vshd")

    def _drop(self, fd: int, why: str) -> None:
        self._forget(fd)
        os.close(fd)
        self._refuse(why)

    def _forget(self, fd: int) -> None:
        del self._waiting[fd]
        self._pairs.ignore(fd)
