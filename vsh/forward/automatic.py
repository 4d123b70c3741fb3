"""The ports that a guest listens on, listened at here as long as the guest does (docs/reference/protocol.md 3.6).

Owns the connection over which the guest reports, and a listener of this host for each of its ports. A guest may lie, or
report more than anybody can use: it gets FORWARDED_MAX ports, and a pace.
"""

import errno
import os
import time

from vsh.errors import VshError
from vsh.forward.choice import FORWARDED_MAX, AutomaticSpec, PortChange, list_candidates, render_target
from vsh.forward.listening import FOREVER_S, ForwardListener, LocalListener, Opener
from vsh.forward.openings import Openings
from vsh.forward.spec import LOCAL, LOOPBACK, ForwardSpec
from vshd.carry.bridge import Pairs
from vshd.carry.endpoints import PlaceError
from vshd.wire.errors import RemoteProtocolError
from vshd.wire.ports import ReportReader

# One read of reports, and the pause before the next: more often than that there is nothing new.
READ_SIZE = 1 << 14
READ_PAUSE_S = 0.1
# A guest that comes back within this time keeps its ports: vshd was restarted.
GRACE_S = 3.0
RETRY_S = 0.5
# Ports may be opened so many at once, and later one in each interval: the lines of a guest that opens them in a loop
# must not fill a terminal.
BURST_MAX = 256
REFILL_S = 1.0
# The same explanation is given so often.
EXPLAIN_S = 60.0
# A loopback without ::1, or a kernel without IPv6.
NO_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
LOOPBACKS = (LOOPBACK, "[::1]")


class _Port:
    """A port of the guest that is forwarded. target: its place there."""

    __slots__ = ("listeners", "target")

    def __init__(self, target: str, listeners: list[LocalListener]) -> None:
        self.target = target
        self.listeners = listeners

    @property
    def listening(self) -> tuple[str, ...]:
        return tuple(listener.place.removeprefix("tcp:") for listener in self.listeners)


class AutomaticListener(ForwardListener):
    """Invariant: `_ports` are the guest's ports that this host listens for, `_refused` those that found no place here.
    `_retired` are listeners of ports that are gone, as long as a connection needs them.
    """

    def __init__(self, service: Opener, forward: AutomaticSpec) -> None:
        super().__init__(service, forward)
        self._spec = forward
        # When each kind of explanation was given last.
        self._told_s: dict[str, float] = {}
        self._reports = -1
        self._reader = ReportReader()
        self._first = b""
        self._ports: dict[int, _Port] = {}
        self._refused: set[int] = set()
        self._retired: list[LocalListener] = []
        self._wanted: dict[int, bytes] = {}
        self._is_watching = False
        self._is_opening = False
        # Without a good report since then; and whether that has lasted too long.
        self._lost_s: float | None = None
        self._is_lost = False
        self._read_from_s = 0.0
        self._retry_s = 0.0
        self._opens_left = float(BURST_MAX)
        self._counted_s = time.monotonic()

    @property
    def reserved_fds(self) -> int:
        """Two listeners of each port."""
        return 2 * (FORWARDED_MAX + 1)

    @property
    def waiting(self) -> int:
        return sum(listener.waiting for listener in self._list_all())

    def open(self) -> None:
        self._reports, self._first = self.service.open_reports()

    def accept(self) -> int:
        raise NotImplementedError

    def connect(self, fd: int) -> tuple[int, bytes]:
        raise NotImplementedError

    def start(self, pairs: Pairs, openings: Openings) -> None:
        super().start(pairs, openings)
        self._receive(self._first)

    def tend(self, *, is_full: bool) -> float:
        now_s = time.monotonic()
        waits_s = [self._tend_loss(now_s), self._tend_reports(now_s)]
        self._opens_left = min(BURST_MAX, self._opens_left + (now_s - self._counted_s) / REFILL_S)
        self._counted_s = now_s
        if self._apply():
            waits_s.append(REFILL_S)
        for listener in [listener for listener in self._retired if not listener.is_used]:
            listener.close()
            self._retired.remove(listener)
        waits_s += [listener.tend(is_full=is_full) for listener in self._list_all()]
        return min(waits_s)

    def close(self) -> None:
        self._drop_reports()
        for listener in self._list_all():
            listener.close()
        self._ports.clear()
        self._retired.clear()

    def _list_all(self) -> list[LocalListener]:
        return [listener for port in self._ports.values() for listener in port.listeners] + self._retired

    # The guest's reports.

    def _tend_loss(self, now_s: float) -> float:
        """Ends the ports of a guest that does not come back; the seconds until then."""
        if self._lost_s is None or self._is_lost:
            return FOREVER_S
        if self._lost_s + GRACE_S > now_s:
            return self._lost_s + GRACE_S - now_s
        self._is_lost = True
        self._wanted = {}
        self._explain("gone", "the guest is gone; its ports come back with it")
        return FOREVER_S

    def _tend_reports(self, now_s: float) -> float:
        """Reads on after a pause, or connects anew; the seconds until there is something to do."""
        if self._reports >= 0:
            if not self._is_watching and self._read_from_s <= now_s:
                self._is_watching = True
                self._pairs.watch(self._reports, self._read)
            return FOREVER_S if self._is_watching else self._read_from_s - now_s
        if not self._is_opening and self._retry_s > now_s:
            return self._retry_s - now_s
        if not self._is_opening:
            self._is_opening = True
            self._openings.start("reports", self.service.open_reports, self._reopened, self._not_reopened)
        return FOREVER_S

    def _reopened(self, opened: tuple[int, bytes]) -> None:
        self._is_opening = False
        self._reports, first = opened
        self._reader = ReportReader()
        self._receive(first)

    def _not_reopened(self, _: VshError) -> None:
        self._is_opening = False
        self._retry_s = time.monotonic() + RETRY_S

    def _read(self) -> None:
        self._is_watching = False
        self._pairs.ignore(self._reports)
        self._read_from_s = time.monotonic() + READ_PAUSE_S
        try:
            data = os.read(self._reports, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._receive(data)
        else:
            self._lose()

    def _receive(self, data: bytes) -> None:
        try:
            ports = self._reader.receive_data(data)
        except RemoteProtocolError as error:
            self._explain("garbage", f"the guest sent what is no list of ports: {error}")
            self._lose()
            return
        if ports is None:
            return
        if self._is_lost:
            self._explain("back", "the guest is back")
        self._lost_s, self._is_lost = None, False
        wanted, too_many = self._spec.choose(ports, self._ports)
        too_many += self._reader.left_out
        if too_many:
            count = len(wanted) + too_many
            self._explain("number", f"the guest listens on {count} ports; {len(wanted)} of them are forwarded")
        self._wanted = wanted
        self._refused &= wanted.keys()

    def _lose(self) -> None:
        self._drop_reports()
        now_s = time.monotonic()
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        self._retry_s = now_s + RETRY_S

    def _explain(self, kind: str, text: str) -> None:
        """Tells what the guest does, or this side about it. A guest can do that as often as it likes."""
        now_s = time.monotonic()
        if now_s - self._told_s.get(kind, -EXPLAIN_S) >= EXPLAIN_S:
            self._told_s[kind] = now_s
            self._spec.on_notice(text)

    def _drop_reports(self) -> None:
        if self._reports >= 0:
            if self._is_watching:
                self._is_watching = False
                self._pairs.ignore(self._reports)
            os.close(self._reports)
            self._reports = -1

    # This host's listeners.

    def _apply(self) -> bool:
        """Makes the ports those that are wanted; whether some have to wait for the pace."""
        for number, port in list(self._ports.items()):
            address = self._wanted.get(number)
            if address is None or render_target(address, number) != port.target:
                self._close_port(number)
        new = [number for number in self._wanted if number not in self._ports and number not in self._refused]
        if not new:
            return False
        count = int(self._opens_left)
        if count < len(new):
            self._explain("pace", f"the guest opens ports too often; one each {REFILL_S:g} s is forwarded now")
        self._opens_left -= len(new[:count])
        # Each gets its own number, if that is free, before another one takes it as the next.
        codes = {number: self._open_port(number, number) for number in new[:count]}
        for number, code in codes.items():
            if code:
                self._open_elsewhere(number, code)
        return count < len(new)

    def _open_elsewhere(self, number: int, code: int) -> None:
        is_privileged = code in (errno.EACCES, errno.EPERM)
        reason = f"port {number} of this host is {_render_code(code)}"
        for candidate in list_candidates(number, is_privileged=is_privileged):
            if not self._open_port(number, candidate, reason):
                return
        self._refused.add(number)
        self._spec.on_change(PortChange(PortChange.REFUSED, number, reason=f"{reason}, and so are the next ones"))

    def _open_port(self, number: int, here: int, reason: str = "") -> int:
        """Listens at a port of this host for one of the guest: 0, or the errno of what stands in the way."""
        target = render_target(self._wanted[number], number)
        listeners: list[LocalListener] = []
        for host in LOOPBACKS:
            listener = LocalListener(self.service, ForwardSpec(LOCAL, f"tcp:{host}:{here}", target))
            try:
                listener.open()
            except VshError as error:
                code = error.__cause__.error if isinstance(error.__cause__, PlaceError) else errno.EIO
                if listeners and code in NO_ADDRESS:
                    break
                for other in listeners:
                    other.close()
                return code or errno.EIO
            listeners.append(listener)
        for listener in listeners:
            listener.start(self._pairs, self._openings)
        port = self._ports[number] = _Port(target, listeners)
        self._spec.on_change(PortChange(PortChange.OPENED, number, port.listening, reason))
        return 0

    def _close_port(self, number: int) -> None:
        port = self._ports.pop(number)
        for listener in port.listeners:
            listener.retire()
            self._retired.append(listener)
        self._spec.on_change(PortChange(PortChange.CLOSED, number, port.listening))


def _render_code(code: int) -> str:
    if code == errno.EADDRINUSE:
        return "in use"
    if code in (errno.EACCES, errno.EPERM):
        return "for root alone"
    return f"of no use ({os.strerror(code)})"
