"""The listeners of forwards: of a place here, of a place in the guest, of a vsock port of this host.

What a listener accepts waits while the other side is opened in a thread, and is then a pair. Knows what opens through
the service it belongs to, and nothing of the loop but when it is asked to tend.
"""

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

from vsh.errors import ConnectionLost, VshError
from vsh.forward.admissions import WAITING_MAX, Admissions
from vsh.forward.branches import AHEAD_MAX, Branches, ForwardClient
from vsh.forward.choice import AutomaticSpec
from vsh.forward.clients import ClientLeft, is_open
from vsh.forward.guest import GuestListener
from vsh.forward.openings import Openings
from vsh.forward.patience import Patience, is_full
from vsh.forward.spec import DYNAMIC, LOCAL, MAPPED, ForwardSpec
from vsh.forward.trunk import Dialer
from vsh.listener import HostListener
from vshd.carry import endpoints
from vshd.carry.bridge import Pairs, Side
from vshd.carry.endpoints import PlaceError
from vshd.carry.mapping import MappingError, find_cid, find_original, parse_prefix

# For a guest that is being restarted: how often to ask whether it is back.
RETRY_S = 1.0
# After an accept() that failed for want of descriptors or memory.
ACCEPT_PAUSE_S = 0.1
FOREVER_S = 1e9


class Opener(Protocol):
    """What a listener needs of the service it belongs to."""

    patience: Patience

    def make_dialer(self, target: str) -> Dialer: ...
    def connect_guest(self, target: str, is_wanted: Callable[[], bool]) -> tuple[int, bytes]: ...
    def connect_host(self, target: str) -> int: ...
    def connect_cid(self, cid: int, port: int, is_wanted: Callable[[], bool]) -> tuple[int, bytes]: ...
    def listen_in_guest(self, place: str) -> GuestListener: ...
    def open_reports(self) -> tuple[int, bytes]: ...
    def listen_for_guest(self, port: int | None) -> HostListener: ...
    def tell(self, forward: ForwardSpec, error: VshError) -> None: ...
    def tell_stranger(self, forward: ForwardSpec, text: str) -> None: ...
    def lose(self, forward: ForwardSpec, error: VshError) -> bool: ...


class ForwardListener(ABC):
    """One forward's listener. `place` is where it listens."""

    def __init__(self, service: Opener, forward: ForwardSpec) -> None:
        self.service = service
        self.forward = forward
        self.place = forward.listen
        self._fd = -1
        self._is_watched = False

    @property
    def reserved_fds(self) -> int:
        """Descriptors that it may need beside those of its connections."""
        return WAITING_MAX + AHEAD_MAX

    @abstractmethod
    def open(self) -> None:
        """Listens. Raises VshError."""

    @abstractmethod
    def accept(self) -> int:
        """The next connection's descriptor."""

    def find_way(self, fd: int) -> str:
        """What connections that wait for one another have in common: the way to their other side."""
        return self.forward.target

    @abstractmethod
    def connect(self, fd: int) -> tuple[int, bytes]:
        """In a thread: the other side for what was accepted, and what was read from it already."""

    @abstractmethod
    def close(self) -> None:
        """Stops listening."""

    @property
    def waiting(self) -> int:
        """Connections that are neither pairs nor counted by the openings."""
        return 0

    def start(self, pairs: Pairs, openings: Openings) -> None:
        """The loop begins."""
        self._pairs = pairs
        self._openings = openings

    def tend(self, *, is_full: bool) -> float:
        """Before each turn: listens or does not; returns how long the turn may last."""
        self._watch(self._fd >= 0 and not is_full)
        return FOREVER_S

    def _watch(self, is_wanted: bool) -> None:
        if self._is_watched != is_wanted:
            self._is_watched = is_wanted
            if is_wanted:
                self._pairs.watch(self._fd, self._serve)
            else:
                self._pairs.ignore(self._fd)

    def _serve(self) -> None:
        try:
            fd = self.accept()
        except BlockingIOError:
            return
        except VshError as error:
            self.service.tell(self.forward, error)
            return
        except OSError as error:
            self.service.tell(self.forward, VshError(f"cannot accept a connection: {error.strerror}"))
            time.sleep(ACCEPT_PAUSE_S)
            return
        self.take(fd)

    def take(self, fd: int) -> None:
        """An accepted connection, which is opened to the other side."""
        self.bring(fd)

    def bring(self, fd: int) -> None:
        """Opens the other side of a connection, and makes a pair of both; a client that left meanwhile is dropped."""
        left = Side(fd)

        def connect() -> tuple[int, bytes]:
            if not is_open(fd):
                raise ClientLeft(f"{self.forward}: the client left before its turn came")
            try:
                return self.connect(fd)
            except VshError as error:
                if is_full(error) and not is_open(fd):
                    raise ClientLeft(f"{self.forward}: the client left while it waited") from error
                raise

        def done(opened: tuple[int, bytes]) -> None:
            self.join(left, *opened)

        def failed(error: VshError) -> None:
            self.drop(left, error)

        self._openings.start(self.find_way(fd), connect, done, failed)

    def join(self, left: Side, fd: int, rest: bytes) -> None:
        """The other side is open: makes a pair of both. rest: what was read from `fd` already."""
        self._pairs.add(left, Side(fd), to_left=rest)

    def drop(self, left: Side, error: VshError) -> None:
        """The other side could not be opened."""
        left.close(is_reset=True)
        if not isinstance(error, ClientLeft):
            self.service.tell(self.forward, error)


class LocalListener(ForwardListener):
    """-L: a TCP port or UNIX socket here. What its vshd has to open in the guest gets branches."""

    _branches: Branches | None = None

    def open(self) -> None:
        try:
            self._bound = endpoints.listen(self.forward.listen)
        except PlaceError as error:
            hint = "choose another path, or remove what is there" if error.error == errno.EEXIST else ""
            raise VshError(str(error), hint=hint) from error
        self._fd = self._bound.socket.fileno()
        self.place = endpoints.render(self._bound, self.forward.listen)

    def accept(self) -> int:
        return self._bound.accept()[0]

    def start(self, pairs: Pairs, openings: Openings) -> None:
        super().start(pairs, openings)
        target = self.forward.target
        if target.startswith(("tcp:", "unix:")):
            dialer = self.service.make_dialer(target)
            patience = self.service.patience
            self._branches = Branches(target, dialer, patience, pairs, openings, self._fail)

    @property
    def waiting(self) -> int:
        return self._branches.count if self._branches is not None else 0

    def tend(self, *, is_full: bool) -> float:
        wait_s = super().tend(is_full=is_full)
        return wait_s if self._branches is None else min(wait_s, self._branches.tend())

    def bring(self, fd: int) -> None:
        if self._branches is None:
            super().bring(fd)
        else:
            self._branches.bring(ForwardClient(Side(fd)))

    def _fail(self, client: ForwardClient, error: VshError) -> None:
        self.drop(client.left, error)

    def connect(self, fd: int) -> tuple[int, bytes]:
        return self.service.connect_guest(self.forward.target, lambda: is_open(fd))

    def retire(self) -> None:
        """Listens no more. The connections that it has brought go on."""
        self._watch(False)
        if self._fd >= 0:
            self._bound.close()
            self._fd = -1

    @property
    def is_used(self) -> bool:
        """Whether a connection needs it still."""
        return self._branches is not None and self._branches.is_used

    def close(self) -> None:
        if self._branches is not None:
            self._branches.close()
            self._branches = None
        if self._fd >= 0:
            self._bound.close()
            self._fd = -1


class _MappedListener(LocalListener):
    """All ports of all CIDs, redirected here by the kernel (vshd.carry.mapping)."""

    def find_way(self, fd: int) -> str:
        try:
            return find_original(fd)[0].hex()
        except OSError:
            return ""

    def connect(self, fd: int) -> tuple[int, bytes]:
        try:
            address, port = find_original(fd)
            cid = find_cid(parse_prefix(self.forward.target), address)
        except (OSError, MappingError) as error:
            raise VshError(f"a connection that was not meant for a guest: {error}") from error
        return self.service.connect_cid(cid, port, lambda: is_open(fd))


class _Returning(ForwardListener):
    """Listens where the guest's side is; when that goes, it can be opened anew."""

    _retry_s = FOREVER_S
    _is_opening = False

    def tend(self, *, is_full: bool) -> float:
        if self._fd < 0 and not self._is_opening and self._retry_s <= time.monotonic():
            self._is_opening = True
            self._openings.start(f"{self.forward}", self._reopen, self._opened, self._not_opened)
        super().tend(is_full=is_full)
        return FOREVER_S if self._is_opening or self._fd >= 0 else max(0.0, self._retry_s - time.monotonic())

    def lose(self, reason: str) -> None:
        """It is gone with its guest."""
        self._watch(False)
        self.close()
        if self.service.lose(self.forward, ConnectionLost(f"{self.forward}: {reason}")):
            self._retry_s = time.monotonic() + RETRY_S

    @abstractmethod
    def _reopen(self) -> None:
        """Listens again, in a thread. Raises VshError."""

    def _opened(self, _: None) -> None:
        self._is_opening = False

    def _not_opened(self, _: VshError) -> None:
        self._is_opening = False
        self._retry_s = time.monotonic() + RETRY_S


class _Vsock(_Returning):
    """-R vsock:PORT: a vsock port of this host, for the guest."""

    _listener: HostListener | None = None

    def open(self) -> None:
        # What was chosen for port 0 stays, as the guest knows it by now.
        port = int(self.place.removeprefix("vsock:"))
        self._listener = self.service.listen_for_guest(port or None)
        self.place = f"vsock:{self._listener.port}"
        self._listener.socket.setblocking(False)
        self._fd = self._listener.socket.fileno()

    def tend(self, *, is_full: bool) -> float:
        # A machine's directory goes with it, and with it what is bound there; no descriptor says so.
        if self._listener is not None and not self._listener.is_there():
            self.lose("the machine is gone")
        return min(super().tend(is_full=is_full), RETRY_S)

    def accept(self) -> int:
        assert self._listener is not None
        return self._listener.accept()

    def connect(self, fd: int) -> tuple[int, bytes]:
        return self.service.connect_host(self.forward.target), b""

    def close(self) -> None:
        self._fd = -1
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _reopen(self) -> None:
        self.open()


class _Remote(_Returning):
    """-R: a TCP port or UNIX socket of the guest, listened at by its vshd."""

    _listener: GuestListener | None = None
    _next: GuestListener | None = None
    _admissions: Admissions | None = None

    def open(self) -> None:
        self._take(self.service.listen_in_guest(self.forward.listen))

    def start(self, pairs: Pairs, openings: Openings) -> None:
        super().start(pairs, openings)
        self._begin()

    def tend(self, *, is_full: bool) -> float:
        wait_s = super().tend(is_full=is_full)
        return wait_s if self._admissions is None else min(wait_s, self._admissions.tend())

    def accept(self) -> int:
        assert self._listener is not None
        return self._listener.back.accept()

    def take(self, fd: int) -> None:
        assert self._admissions is not None
        self._admissions.add(fd)

    def connect(self, fd: int) -> tuple[int, bytes]:
        return self.service.connect_host(self.forward.target), b""

    def close(self) -> None:
        self._fd = -1
        if self._admissions is not None:
            self._admissions.close()
            self._admissions = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def lose(self, reason: str) -> None:
        if self._listener is not None:
            self._pairs.ignore(self._listener.control)
        super().lose(reason)

    def _reopen(self) -> None:
        self._next = self.service.listen_in_guest(self.forward.listen)

    def _opened(self, _: None) -> None:
        super()._opened(None)
        if self._next is not None:
            self._take(self._next)
            self._next = None
            self._begin()

    def _take(self, listener: GuestListener) -> None:
        self._listener = listener
        listener.back.socket.setblocking(False)
        self._fd = listener.back.socket.fileno()
        self.place = listener.place

    def _begin(self) -> None:
        assert self._listener is not None
        back = self._listener.back.place

        def refuse(why: str) -> None:
            self.service.tell_stranger(self.forward, f"a connection to {back} was closed: {why}")

        self._admissions = Admissions(self._pairs, self._listener.token, self.bring, refuse)
        self._pairs.watch(self._listener.control, lambda: self.lose("the guest's vshd listens no more"))


def make_listener(service: Opener, forward: ForwardSpec) -> ForwardListener:
    """The listener that a forward needs, not open yet."""
    if forward.kind == MAPPED:
        return _MappedListener(service, forward)
    if isinstance(forward, AutomaticSpec):
        from vsh.forward.automatic import AutomaticListener  # noqa: PLC0415 - few ask for it

        return AutomaticListener(service, forward)
    if forward.kind == DYNAMIC:
        from vsh.forward.dynamic import DynamicListener  # noqa: PLC0415 - few ask for it

        return DynamicListener(service, forward)
    if forward.kind == LOCAL:
        return LocalListener(service, forward)
    if forward.listen.startswith("vsock:"):
        return _Vsock(service, forward)
    return _Remote(service, forward)
