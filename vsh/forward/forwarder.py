"""Serves forwards: listens, opens the other side of what is accepted, and carries, until it is told to end.

One loop for all forwards of a process. What is accepted waits while its other side is being opened
(vsh.forward.openings); a failure costs that one connection, and a line.
"""

from collections.abc import Callable, Sequence
from typing import Self

from vsh.address import Address, find_by_cid
from vsh.errors import VshError
from vsh.forward.guest import GuestListener, connect_guest, listen_in_guest, open_reports
from vsh.forward.listening import FOREVER_S, ForwardListener, make_listener
from vsh.forward.openings import Openings
from vsh.forward.patience import Patience
from vsh.forward.spec import ForwardSpec
from vsh.forward.throttle import Throttle
from vsh.forward.trunk import Dialer
from vsh.limits import raise_open_files
from vsh.listener import HostListener, listen_for_guest
from vshd.carry import endpoints
from vshd.carry.bridge import Pairs
from vshd.carry.endpoints import PlaceError

# Connections at once, of all forwards, with those that wait for their other side; later ones wait in the backlog.
CONNECTIONS_MAX = 512
# Beside the two of each connection, and those without a token yet: standard streams, listeners, pipes for bulk, files,
# the loop's own.
RESERVED_FDS = 128
BACKLOG = 1024

FindAddress = Callable[[], Address]
Tell = Callable[[str], None]


class Forwarder:
    """Invariant: what is listened at is in `_listeners`, by forward, from open() to close()."""

    def __init__(
        self,
        find_address: FindAddress,
        forwards: Sequence[ForwardSpec],
        *,
        user: str = "",
        timeout_s: float = 30.0,
        tell: Tell,
        is_lasting: bool = False,
    ) -> None:
        """find_address: where the guest is, asked for each connection. user: who connects in the guest.

        timeout_s: how long a client waits when no other is served. tell: gets a line about each that could not be
        opened. is_lasting: a guest that goes away is waited for; otherwise a listener lost in the guest ends the
        forwarder.
        """
        self._find_address = find_address
        self._forwards = forwards
        self._user = user
        self._timeout_s = timeout_s
        self.patience = Patience(timeout_s)
        self._failures, self._strangers = Throttle(tell), Throttle(tell)
        self._is_lasting = is_lasting
        self._listeners: list[ForwardListener] = []
        self.pairs = Pairs()
        self.lost: VshError | None = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def listening(self) -> list[str]:
        """Where each forward listens, with the ports the kernels chose; in the order of the forwards."""
        return [listener.place for listener in self._listeners]

    def run(self, stop_fd: int) -> None:
        """Serves until stop_fd can be read, or has ended. Raises VshError when a guest's listener is lost."""
        openings = Openings()
        reserved = RESERVED_FDS + sum(listener.reserved_fds for listener in self._listeners)
        files = raise_open_files(2 * CONNECTIONS_MAX + reserved)
        limit = min(CONNECTIONS_MAX, max(1, (files - reserved) // 2))
        stop: list[int] = []
        self.pairs.watch(openings.fd, openings.serve)
        self.pairs.watch(stop_fd, lambda: stop.append(1))
        for listener in self._listeners:
            listener.start(self.pairs, openings)
        while not stop:
            if self.lost is not None:
                raise self.lost
            waiting = openings.count + sum(listener.waiting for listener in self._listeners)
            is_full = self.pairs.count + waiting >= limit
            waits_s = [listener.tend(is_full=is_full) for listener in self._listeners]
            waits_s += [left_s for throttle in (self._failures, self._strangers) if (left_s := throttle.tend())]
            wait_s = min(waits_s, default=FOREVER_S)
            self.pairs.turn(wait_s if wait_s != FOREVER_S else None)

    def close(self) -> None:
        """Stops listening, and ends every connection."""
        self.pairs.close()
        self._failures.flush()
        self._strangers.flush()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def _open(self) -> None:
        for forward in self._forwards:
            listener = make_listener(self, forward)
            self._listeners.append(listener)
            listener.open()

    # For the listeners.

    def make_dialer(self, target: str) -> Dialer:
        return Dialer(self._find_address, target, self._user)

    def connect_guest(self, target: str, is_wanted: Callable[[], bool]) -> tuple[int, bytes]:
        return self.patience.open(
            lambda timeout_s: connect_guest(self._find_address(), target, user=self._user, timeout_s=timeout_s),
            is_wanted,
        )

    def connect_cid(self, cid: int, port: int, is_wanted: Callable[[], bool]) -> tuple[int, bytes]:
        return self.patience.open(
            lambda timeout_s: connect_guest(find_by_cid(cid), f"vsock:{port}", timeout_s=timeout_s), is_wanted
        )

    def listen_in_guest(self, place: str) -> GuestListener:
        return listen_in_guest(self._find_address(), place, user=self._user, timeout_s=self._timeout_s)

    def open_reports(self) -> tuple[int, bytes]:
        return open_reports(self._find_address(), user=self._user, timeout_s=self._timeout_s)

    def listen_for_guest(self, port: int | None) -> HostListener:
        return listen_for_guest(self._find_address(), port, backlog=BACKLOG)

    def connect_host(self, target: str) -> int:
        try:
            return endpoints.connect(target, self._timeout_s)
        except PlaceError as error:
            raise VshError(str(error)) from error

    def tell(self, forward: ForwardSpec, error: VshError) -> None:
        from vsh.text import clean_line  # noqa: PLC0415 - only after a failure

        # Words of the guest may be in it.
        self._failures.say(f"{forward}: {clean_line(error.brief)}")

    def tell_stranger(self, forward: ForwardSpec, text: str) -> None:
        """A connection that is not from the guest's vshd; any program of the guest can make those."""
        self._strangers.say(f"{forward}: {text}")

    def lose(self, forward: ForwardSpec, error: VshError) -> bool:
        """A listener is gone: whether to wait for the guest to come back."""
        if not self._is_lasting:
            self.lost = error
        return self._is_lasting
