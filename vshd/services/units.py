"""Reports the guest's failed services to the host as they fail (docs/reference/protocol.md 5.8).

This process connects to the private socket of the guest's systemd, which is root's alone. systemd sends each change of
a unit there, so nothing is asked again and again, and no user of the guest can report a failure or a false one.
"""

import _socket
import os
import select
import sys
import time

from vshd.services.failures import UnitWatch
from vshd.session.refusal import RefusalError
from vshd.signals import SIGINT, SIGTERM
from vshd.wire import messages, units
from vshd.wire.errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vshd.log import Log
    from vshd.root import Root
    from vshd.services.table import Surroundings
    from vshd.signals import Wakeup
    from vshd.wire.requests import Units
    from vshd.wire.units import UnitFacts

SOCKET = "/run/systemd/private"
INIT = "/proc/1/exe"
SYSTEMD = "systemd"
# pid 1 becomes it soon (vshd.pid1.system).
FACT = b"INIT=systemd\n"
READ_SIZE = 1 << 16
# struct ucred, unix(7): three numbers, of which the second is the user.
CREDENTIALS_SIZE = 12
# systemd makes its socket early in its start, and anew when it executes itself again.
RETRY_FIRST_S, RETRY_MAX_S = 0.5, 10.0
# systemd answers nothing while it reads its units.
OPEN_S = 60.0
# The host may be stopped for a while.
SEND_S = 60.0
# A service that fails again and again has half of them, so that it cannot use up another's.
BURST, UNIT_BURST, BURST_S = 10, 5, 60.0
# Between two words about failures that were left out.
LOST_S = 10.0


class UnitsEndedError(Exception):
    """The service ends, for a reason in words."""


def user_of(_units: "Units") -> bytes:
    """Root, by whatever rules this vshd lets a client be root."""
    return b"root"


def describe(_units: "Units") -> str:
    """What the log calls it."""
    return "failed services"


def open_service(_units: "Units", _fd: int, around: "Surroundings") -> "UnitService":
    """Raises RefusalError where the guest has no systemd."""
    name = SYSTEMD if FACT in around.facts else find_init()
    if name != SYSTEMD:
        raise RefusalError(f"this guest has no systemd: its pid 1 is {name or 'unknown'}", messages.NOT_FOUND)
    return UnitService(around.root)


def find_init(link: str = INIT) -> str:
    """The name of pid 1's program; empty where it cannot be read. It is also that of a root which is not vshd's."""
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return ""


class UnitService:
    """Invariant: `_bus` is open while there is a connection to systemd; else the next attempt is due at `_due_s`."""

    description = b""

    def __init__(self, root: "Root | None", path: str = SOCKET, uid: int | None = None) -> None:
        """root: that in which systemd runs, where it is not vshd's own. uid: systemd's user; None: our own."""
        self._root = root
        self._path = path
        self._uid = os.geteuid() if uid is None else uid
        self._watch = UnitWatch()
        self._bus: _socket.socket | None = None
        self._unsent = b""
        self._due_s = 0.0
        self._pause_s = RETRY_FIRST_S
        # When the failures of the last while came, and of which units.
        self._starts: list[tuple[float, bytes]] = []
        self._lost = 0
        self._lost_due_s = 0.0

    def run(self, fd: int, _rest: bytes, wakeup: "Wakeup", log: "Log") -> str:
        """Serves until the host closes the connection."""
        os.set_blocking(fd, False)
        try:
            while True:
                self._turn(fd, wakeup, log)
        except UnitsEndedError as error:
            return f"ended: {error}"
        except OSError as error:
            return f"ended: {error.strerror}"
        finally:
            self._drop()
            os.close(fd)

    def _turn(self, fd: int, wakeup: "Wakeup", log: "Log") -> None:
        """Waits for the next thing to do, and does it. Raises UnitsEndedError, OSError."""
        now_s = time.monotonic()
        if self._bus is None and now_s >= self._due_s:
            self._connect(now_s)
        if self._lost and now_s >= self._lost_due_s:
            self._tell_lost(fd, now_s, wakeup)
        poll = select.poll()
        poll.register(wakeup.fd, select.POLLIN)
        poll.register(fd, select.POLLIN)
        if self._bus is not None:
            poll.register(self._bus.fileno(), select.POLLIN | (select.POLLOUT if self._unsent else 0))
        ready = [found for found, _ in poll.poll(self._find_wait_ms(now_s))]
        _obey(wakeup)
        if fd in ready:
            # The host sends nothing, so this is its end.
            raise UnitsEndedError("the host has left")
        if self._bus is None:
            return
        if self._bus.fileno() in ready:
            for facts in self._exchange():
                self._report(facts, fd, wakeup, log)
        elif not self._watch.is_open and time.monotonic() >= self._due_s:
            self._drop()

    def _find_wait_ms(self, now_s: float) -> float | None:
        """Until the next attempt, or word about lost ones. None, and so no wait ends, once systemd has let us in."""
        dues = [self._due_s] if self._bus is None or not self._watch.is_open else []
        dues += [self._lost_due_s] if self._lost else []
        return max(0.0, min(dues) - now_s) * 1000 + 1 if dues else None

    def _connect(self, now_s: float) -> None:
        """Connects to systemd, or has that be tried again later."""
        bus = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            bus.setblocking(False)
            if self._root is not None:
                self._root.enter()
            try:
                bus.connect(self._path)
            finally:
                if self._root is not None:
                    self._root.leave()
            server = bus.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, CREDENTIALS_SIZE)
            if int.from_bytes(server[4:8], sys.byteorder) != self._uid:
                raise OSError("its server is another user's")
        except OSError:
            bus.close()
            self._wait(now_s)
            return
        self._bus = bus
        self._due_s = now_s + OPEN_S
        self._watch.begin(self._uid)
        self._unsent = self._watch.take_outgoing()

    def _wait(self, now_s: float) -> None:
        self._due_s = now_s + self._pause_s
        self._pause_s = min(RETRY_MAX_S, self._pause_s * 2)

    def _drop(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None
            self._wait(time.monotonic())

    def _exchange(self) -> "list[UnitFacts]":
        """Sends to systemd what waits, and reads; the failures that it tells of."""
        assert self._bus is not None
        found: list[UnitFacts] = []
        try:
            self._unsent = self._unsent[_try_send(self._bus, self._unsent) :]
            data = self._bus.recv(READ_SIZE)
            found = self._watch.receive(data)
        except BlockingIOError:
            return found
        except (OSError, RemoteProtocolError):
            data = b""
        if not data:
            # systemd executes itself anew, or ends.
            self._drop()
            return found
        if self._watch.is_open:
            self._pause_s = RETRY_FIRST_S
        self._unsent += self._watch.take_outgoing()
        return found

    def _report(self, facts: "UnitFacts", fd: int, wakeup: "Wakeup", log: "Log") -> None:
        """Raises UnitsEndedError where the connection is of no more use."""
        now_s = time.monotonic()
        self._starts = [(start_s, whose) for start_s, whose in self._starts if now_s - start_s < BURST_S]
        own = sum(whose == facts.unit for _, whose in self._starts)
        if len(self._starts) >= BURST or own >= UNIT_BURST:
            self._lost += 1
            return
        self._starts.append((now_s, facts.unit))
        _send(fd, units.encode(units.FAILED, facts.encode()), wakeup)
        log.info(f"failed service {facts.unit.decode('ascii', 'replace')}: {facts.result.decode('ascii', 'replace')}")

    def _tell_lost(self, fd: int, now_s: float, wakeup: "Wakeup") -> None:
        _send(fd, units.encode(units.LOST, self._lost.to_bytes(4, "little")), wakeup)
        self._lost = 0
        self._lost_due_s = now_s + LOST_S


def _try_send(bus: _socket.socket, data: bytes) -> int:
    """How many of the bytes systemd has room for. Raises OSError."""
    try:
        return bus.send(data) if data else 0
    except BlockingIOError:
        return 0


def _send(fd: int, data: bytes, wakeup: "Wakeup") -> None:
    """Raises UnitsEndedError when the host does not read, or has left."""
    view = memoryview(data)
    deadline_s = time.monotonic() + SEND_S
    poll = select.poll()
    poll.register(wakeup.fd, select.POLLIN)
    poll.register(fd, select.POLLOUT)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise UnitsEndedError(f"the host took nothing for {SEND_S:g} s") from None
            poll.poll(left_s * 1000)
            _obey(wakeup)
        except OSError as error:
            raise UnitsEndedError(error.strerror or "the connection broke") from error


def _obey(wakeup: "Wakeup") -> None:
    numbers = wakeup.take()
    if SIGTERM in numbers or SIGINT in numbers:
        raise UnitsEndedError("by a signal")
