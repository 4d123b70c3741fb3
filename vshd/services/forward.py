"""Forwards in the guest (docs/reference/protocol.md 3): the client's connection becomes one to a place here, or a place
here is listened at and every connection to it is brought to the client.

Runs in a session's process, as the session's user. Owns what a forward opens; vshd.carry.bridge carries the bytes.
"""

import os
import time

from vshd.carry import endpoints
from vshd.carry.bridge import Pairs, Side
from vshd.carry.endpoints import PlaceError
from vshd.carry.sockets import ListeningSocket
from vshd.log import Log, Throttle
from vshd.session.refusal import RefusalError
from vshd.signals import SIGINT, SIGTERM, Wakeup
from vshd.wire import messages
from vshd.wire.requests import Forward

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.services.table import Handed, Surroundings

# A local server answers at once; a distant one, or one whose backlog is full, within retries of TCP (1, 3, 7, 15 s).
CONNECT_TIMEOUT_S = 20.0
# Connections of one listening forward; who comes later waits in the backlog.
PAIRS_MAX = 256
TOKEN_MAX = 64
# After an accept() that failed for want of descriptors or memory.
ACCEPT_PAUSE_S = 0.1


def user_of(forward: Forward) -> bytes:
    """The user that the client asks for. The request's own user is a stub, for servers that know no forwards."""
    return forward.user


def describe(forward: Forward) -> str:
    """What the log calls it."""
    if forward.branches:
        return os.fsdecode(b"forward to " + forward.branches + b", with branches")
    words = b"forward to " + forward.connect if forward.connect else b"forward from " + forward.listen
    return os.fsdecode(words)


def open_service(forward: Forward, fd: int, around: "Surroundings") -> "Handed":
    """Opens what was asked for. fd: the client's connection, which stays the caller's. Raises RefusalError."""
    if forward.branches and not forward.connect and not forward.listen:
        # Loaded for the few that ask for it.
        from vshd.services.branches import open_branches  # noqa: PLC0415

        return open_branches(forward, fd, around.options)
    try:
        if forward.connect and not forward.listen:
            return Connected(endpoints.connect(os.fsdecode(forward.connect), CONNECT_TIMEOUT_S))
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
        stop = watch_for_stop(pairs, wakeup)
        pairs.add(Side(fd), Side(self._fd), to_right=rest)
        while pairs.count and not stop:
            pairs.turn()
        pairs.close()
        return "vshd is shutting down" if stop else "closed"


class Bringing:
    """Listeners here whose connections are brought elsewhere. Invariant: every accepted connection is in `pairs` with
    the one it was brought to, or closed.
    """

    def __init__(self, listeners: list[ListeningSocket], token: bytes = b"") -> None:
        """token: what each connection elsewhere begins with."""
        self.listeners = listeners
        self.pairs = Pairs()
        self._token = token
        self._log: Log | None = None
        self._failures: Throttle | None = None

    def find_back(self, fd: int) -> str:
        """The place where an accepted connection is brought. Raises PlaceError."""
        raise NotImplementedError

    def serve(self, stop: list[int], log: Log) -> None:
        """Accepts and carries until `stop` is not empty any more."""
        self._log = log
        self._failures = Throttle(log)
        pairs = self.pairs
        is_listening = False
        try:
            while not stop:
                if is_listening != (pairs.count < PAIRS_MAX):
                    is_listening = not is_listening
                    self._listen(is_listening)
                pairs.turn()
        finally:
            for listener in self.listeners:
                listener.close()
            pairs.close()

    def _listen(self, is_wanted: bool) -> None:
        for listener in self.listeners:
            if is_wanted:
                self.pairs.watch(listener.socket.fileno(), lambda listener=listener: self._accept(listener))  # type: ignore[misc]  # mypy cannot infer a default
            else:
                self.pairs.ignore(listener.socket.fileno())

    def _accept(self, listener: ListeningSocket) -> None:
        assert self._log is not None
        try:
            fd, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._log.error(f"cannot accept a connection: {error.strerror}")
            time.sleep(ACCEPT_PAUSE_S)
            return
        left = Side(fd)
        try:
            place = self.find_back(fd)
            back = endpoints.start_connect(place)
        except PlaceError as error:
            self._tell(str(error))
            left.close(is_reset=True)
            return

        def tell_failure(error: int) -> None:
            self._tell(f"cannot bring a connection to {place}: {os.strerror(error)}")

        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        self.pairs.add_connecting(left, Side(back.detach()), deadline_s, tell_failure, to_right=self._token)

    def _tell(self, text: str) -> None:
        """Every client that connects here can cause such a line."""
        assert self._failures is not None
        self._failures.warning(text, time.monotonic())


class Listening(Bringing):
    """A place here whose connections are brought to the client."""

    def __init__(self, place: str, back: str, token: bytes) -> None:
        super().__init__(endpoints.listen_on_each(place), token)
        self._back = back
        rendered = endpoints.render(self.listeners[0], place, is_one_of_two=len(self.listeners) > 1)
        self.description = os.fsencode(rendered)

    def find_back(self, fd: int) -> str:
        return self._back

    def run(self, fd: int, rest: bytes, wakeup: Wakeup, log: Log) -> str:
        """Listens for as long as the client's connection stands; see Connected.run()."""
        stop = watch_for_stop(self.pairs, wakeup)
        # The client has nothing to say: whatever there is to read is its end.
        self.pairs.watch(fd, lambda: stop.append(1))
        try:
            self.serve(stop, log)
        finally:
            os.close(fd)
        return "closed"


def watch_for_stop(pairs: Pairs, wakeup: Wakeup) -> list[int]:
    """A list that is not empty any more once this process was told to end."""
    stop: list[int] = []

    def take() -> None:
        numbers = wakeup.take()
        if SIGTERM in numbers or SIGINT in numbers:
            stop.append(SIGTERM)

    pairs.watch(wakeup.fd, take)
    return stop
