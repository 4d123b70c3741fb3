"""Forwards in the guest (docs/PROTOCOL.md 3): the client's connection becomes one to a place here, or a place here is
listened at and every connection to it is brought to the client.

Runs in a session's process, as the session's user. Owns what a forward opens; vshd.pairs carries the bytes.
"""

import os
import time

from vshd import places
from vshd.log import Log
from vshd.pairs import Pairs, Side
from vshd.places import PlaceError
from vshd.refusal import RefusalError
from vshd.signals import SIGTERM, Wakeup
from vshd.wire import messages
from vshd.wire.messages import Forward

# A local server answers at once; a distant one within a few retries of TCP (1, 3, 7 s).
CONNECT_TIMEOUT_S = 10.0
# Connections of one listening forward; who comes later waits in the backlog.
PAIRS_MAX = 256
TOKEN_MAX = 64
# After an accept() that failed for want of descriptors or memory.
ACCEPT_PAUSE_S = 0.1


def open_forward(forward: Forward) -> "Connected | Listening":
    """What was asked for. Raises RefusalError."""
    try:
        if forward.connect and not forward.listen:
            return Connected(places.connect(os.fsdecode(forward.connect), CONNECT_TIMEOUT_S))
        if forward.listen and forward.back and len(forward.token) <= TOKEN_MAX:
            return Listening(os.fsdecode(forward.listen), os.fsdecode(forward.back), forward.token)
    except PlaceError as error:
        raise RefusalError(str(error), messages.UNREACHABLE, error=error.error) from error
    raise RefusalError("a forward that neither connects nor listens", messages.BAD_REQUEST)


class Connected:
    """The client's connection and one of ours are a pair."""

    description = b""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def run(self, fd: int, rest: bytes, wakeup: Wakeup, log: Log) -> str:
        """Carries until both ways have ended; says how, for the log. fd: the client's; rest: what was read from it."""
        pairs = Pairs()
        stop = _watch_for_stop(pairs, wakeup)
        pairs.add(Side(fd), Side(self._fd), to_right=rest)
        while pairs.count and not stop:
            pairs.turn()
        pairs.close()
        return "vshd is shutting down" if stop else "closed"


class Listening:
    """A listener here. Invariant: every accepted connection is in `_pairs` with one to the client, or closed."""

    def __init__(self, place: str, back: str, token: bytes) -> None:
        self._listener = places.listen(place)
        self._path = place.removeprefix("unix:") if place.startswith("unix:") else ""
        self._back = back
        self._token = token
        self._pairs = Pairs()
        self._log: Log | None = None
        self.description = os.fsencode(places.render(self._listener, place))

    def run(self, fd: int, rest: bytes, wakeup: Wakeup, log: Log) -> str:
        """Listens for as long as the client's connection stands; see Connected.run()."""
        self._log = log
        pairs = self._pairs
        stop = _watch_for_stop(pairs, wakeup)
        # The client has nothing to say: whatever there is to read is its end.
        pairs.watch(fd, lambda: stop.append(1))
        is_listening = False
        try:
            while not stop:
                if is_listening != (pairs.count < PAIRS_MAX):
                    is_listening = not is_listening
                    self._listen(is_listening)
                pairs.turn()
        finally:
            self._listener.close()
            self._unlink()
            pairs.close()
            os.close(fd)
        return "closed"

    def _listen(self, is_wanted: bool) -> None:
        if is_wanted:
            self._pairs.watch(self._listener.fileno(), self._accept)
        else:
            self._pairs.ignore(self._listener.fileno())

    def _accept(self) -> None:
        assert self._log is not None
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return
        except OSError as error:
            self._log.error(f"cannot accept a connection: {error.strerror}")
            time.sleep(ACCEPT_PAUSE_S)
            return
        left = Side(fd)
        try:
            back = places.start_connect(self._back)
        except PlaceError as error:
            self._log.warning(str(error))
            left.close(is_reset=True)
            return
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self._pairs.add_connecting(left, Side(back.detach()), deadline_s, self._tell_failure, to_right=self._token)

    def _tell_failure(self, error: int) -> None:
        if self._log is not None:
            self._log.warning(f"cannot bring a connection to {self._back}: {os.strerror(error)}")

    def _unlink(self) -> None:
        if self._path:
            try:
                os.unlink(self._path)
            except OSError:
                pass


def _watch_for_stop(pairs: Pairs, wakeup: Wakeup) -> list[int]:
    """A list that is not empty any more once this process was told to end."""
    stop: list[int] = []

    def take() -> None:
        if SIGTERM in wakeup.take():
            stop.append(SIGTERM)

    pairs.watch(wakeup.fd, take)
    return stop
