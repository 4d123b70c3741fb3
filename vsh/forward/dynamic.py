"""The listener of -D: each client names the host and the port in the guest by itself, in SOCKS 5 (vsh.forward.socks).

Owns the connections whose request is not whole yet. The guest's vshd looks names up and connects, as it does for -L.
"""

import os
import time

from vsh.errors import VshError
from vsh.forward.clients import ClientLeft, is_open
from vsh.forward.listening import LocalListener, Opener
from vsh.forward.socks import SUCCEEDED, SocksError, SocksServer, choose_code, encode_answer
from vsh.forward.spec import ForwardSpec
from vshd.carry.bridge import Side

# Clients send a request at once. Each costs a place of the forwarder's until then.
REQUEST_TIMEOUT_S = 10.0
# A greeting and a request are shorter; what comes behind them goes along.
READ_SIZE = 1024
# Unread bytes would turn the end of a connection into a reset, which may overtake our answer.
DRAINED_SIZE = 1 << 16


class DynamicListener(LocalListener):
    """Invariant: an accepted connection is in `_greeting` until its request is whole, in the order of the deadlines;
    then in `_asked` until the guest's side is open or has failed.
    """

    def __init__(self, service: Opener, forward: ForwardSpec) -> None:
        super().__init__(service, forward)
        self._greeting: dict[int, tuple[SocksServer, float]] = {}
        self._asked: dict[int, SocksServer] = {}

    @property
    def waiting(self) -> int:
        return len(self._greeting)

    def tend(self, *, is_full: bool) -> float:
        wait_s = super().tend(is_full=is_full)
        while self._greeting:
            fd, (_, deadline_s) = next(iter(self._greeting.items()))
            left_s = deadline_s - time.monotonic()
            if left_s > 0:
                return min(wait_s, left_s)
            self._refuse(fd, SocksError(f"a client sent no request within {REQUEST_TIMEOUT_S:g} s", b""))
        return wait_s

    def take(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._greeting[fd] = SocksServer(), time.monotonic() + REQUEST_TIMEOUT_S
        self._pairs.watch(fd, lambda: self._read(fd))
        self._read(fd)

    def close(self) -> None:
        for fd in list(self._greeting):
            self._forget(fd)
            os.close(fd)
        super().close()

    def find_way(self, fd: int) -> str:
        return self._asked[fd].target

    def connect(self, fd: int) -> tuple[int, bytes]:
        return self.service.connect_guest(self._asked[fd].target, lambda: is_open(fd))

    def join(self, left: Side, fd: int, rest: bytes) -> None:
        asked = self._asked.pop(left.reading)
        self._pairs.add(left, Side(fd), to_right=asked.rest, to_left=encode_answer(SUCCEEDED) + rest)

    def drop(self, left: Side, error: VshError) -> None:
        del self._asked[left.reading]
        if not isinstance(error, ClientLeft):
            _answer(left.writing, encode_answer(choose_code(error)))
            self.service.tell(self.forward, error)
        _finish(left)

    def _read(self, fd: int) -> None:
        socks = self._greeting[fd][0]
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            # It has left, and no one is to be told.
            self._forget(fd)
            os.close(fd)
            return
        try:
            _answer(fd, socks.receive_data(data))
        except SocksError as error:
            self._refuse(fd, error)
            return
        if socks.target:
            self._forget(fd)
            self._asked[fd] = socks
            self.bring(fd)

    def _refuse(self, fd: int, error: SocksError) -> None:
        self._forget(fd)
        _answer(fd, error.answer)
        _finish(Side(fd))
        self.service.tell(self.forward, error)

    def _forget(self, fd: int) -> None:
        self._pairs.ignore(fd)
        del self._greeting[fd]


def _answer(fd: int, data: bytes) -> None:
    """The first bytes of a connection: they fit, or it is gone."""
    if data:
        try:
            os.write(fd, data)
        except OSError:
            pass


def _finish(side: Side) -> None:
    """Ends a connection so that its client reads all that it was sent."""
    side.end()
    try:
        os.read(side.reading, DRAINED_SIZE)
    except OSError:
        pass
    side.close()
