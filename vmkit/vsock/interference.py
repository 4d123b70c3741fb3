"""Brings about the faults that users asked for: on open connections, and on those that come.

It decides by the table (faults.py) and acts through what the device has anyway: an abandoned connection, a half-close,
a socket that gives fewer bytes (brake.py), credit that stays as it is (credit.py). So a fault looks to both programs as
it would if the other side had caused it.
"""

import socket
import time
from collections.abc import Callable
from typing import Protocol

from vmkit.vsock import requests
from vmkit.vsock.brake import BrakedSocket, Delay, Fuse, Rate
from vmkit.vsock.faults import FaultTable
from vmkit.vsock.link import Link
from vmkit.vsock.packet import SHUTDOWN_RECEIVE, SHUTDOWN_SEND
from vmkit.vsock.requests import FREEZE_CREDIT, HALF_CLOSE, REFUSE, RESET, TO_GUEST, TO_HOST, Fault, RequestError


class Deeds(Protocol):
    """The actions that a fault asks of the packets' movers (traffic.py)."""

    def reset(self, link: Link) -> None:
        """Ends a connection from our side."""

    def end(self, link: Link, flags: int) -> None:
        """Owes the guest a SHUTDOWN."""

    def flush(self, link: Link) -> None:
        """Writes to the host program what it takes."""

    def enqueue(self, link: Link) -> None:
        """Serves the link at the next turn."""

    def forget(self, link: Link) -> None:
        """Removes the link from the waits for the guest."""


class Interference:
    """All faults of one device. Invariant: a link in `met` is open, and each number there is a fault in effect."""

    def __init__(self, deeds: Deeds, list_links: Callable[[], list[Link]], resume: Callable[[Link], None]) -> None:
        """list_links: all links there are. resume: writes to a link's program again, after a wait."""
        self._deeds = deeds
        self._list_links = list_links
        self._resume = resume
        self._table = FaultTable()
        # Empty without faults, and then there is no deadline to ask for.
        self.met: dict[Link, dict[int, Fault]] = {}

    # What users ask.

    def list_faults(self) -> list[Fault]:
        """The active faults."""
        return self._table.all()

    def add(self, fault: Fault) -> Fault:
        """Begins a fault; returns it with its number, or 0 for one that is over at once. Raises RequestError."""
        links = [link for link in self._list_links() if link.connection.is_open()]
        if fault.kind in (RESET, HALF_CLOSE) and fault.after < 0:
            links = [link for link in links if self._matches(fault, link)][: fault.times or None]
            for link in links:
                self._act(fault, link)
            return fault._replace(number=0, hits=len(links))
        fault = self._table.add(fault)
        for link in links:
            if self._matches(fault, link) and self._table.get(fault.number) is not None:
                self._begin(fault, link)
        return self._table.get(fault.number) or fault._replace(hits=fault.times)

    def clear(self, number: int) -> int:
        """Ends a fault, or all when the number is 0, also on open connections; returns how many ended."""
        ended = self._table.remove(number)
        for link, met in list(self.met.items()):
            for one in list(met) if number == 0 else ended:
                self._end_on(link, one)
        if number and not ended:
            raise RequestError(f"there is no fault {number}")
        return len(ended)

    # What connections meet.

    def refuses(self, host_port: int, guest_port: int, direction: str) -> bool:
        """Whether a fault refuses a connection that is asked for in this direction."""
        for fault in self._table.find(host_port, guest_port):
            if fault.kind == REFUSE and direction in fault.directions:
                self._table.hit(fault.number)
                return True
        return False

    def meet(self, link: Link) -> None:
        """Begins the faults for a connection that has just been opened."""
        for fault in self._table.find(link.connection.host_port, link.connection.guest_port):
            self._begin(fault, link)

    def part(self, link: Link) -> None:
        """Forgets a link whose socket is being closed."""
        self.met.pop(link, None)

    def note_pending(self, link: Link) -> None:
        """Notes that bytes of the guest wait in a link."""
        if isinstance(link.sock, BrakedSocket):
            link.sock.note_pending(link.pending_bytes)

    def next_s(self) -> float | None:
        """When expire() has work next; None: there is no such time."""
        return min((due for sock in self._braked().values() if (due := sock.next_s()) is not None), default=None)

    def expire(self, now_s: float) -> None:
        """Tries the links again whose wait is over."""
        for link, sock in self._braked().items():
            due_s = sock.next_s()
            if due_s is None or due_s > now_s:
                continue
            for brake in sock.all_brakes():
                brake.wake(now_s)
            self._retry(link)

    def _braked(self) -> dict[Link, BrakedSocket]:
        return {link: link.sock for link in self.met if isinstance(link.sock, BrakedSocket)}

    def _retry(self, link: Link) -> None:
        if link.connection.is_open():
            link.is_readable = True
            self._deeds.enqueue(link)
        if link.is_watching_writes:
            self._resume(link)

    # One fault and one connection.

    def _matches(self, fault: Fault, link: Link) -> bool:
        return fault.matches_ports(link.connection.host_port, link.connection.guest_port)

    def _begin(self, fault: Fault, link: Link) -> None:
        if fault.kind == REFUSE or link.sock is None:
            return
        met = self.met.setdefault(link, {})
        met[fault.number] = fault
        if fault.kind == FREEZE_CREDIT and fault.after < 0:
            self._act(fault, link)
        else:
            self._brake(fault, link, link.sock)
            if fault.after >= 0:
                # It counts when it burns.
                return
        self._table.hit(fault.number)

    def _brake(self, fault: Fault, link: Link, sock: socket.socket) -> None:
        if not isinstance(sock, BrakedSocket):
            sock = link.sock = BrakedSocket(sock)
        fuse = Fuse(fault.after, lambda: self._burn(fault, link))
        for direction in fault.directions:
            match fault.kind:
                case _ if fault.after >= 0:
                    sock.brakes[direction][fault.number] = fuse
                case requests.DELAY:
                    sock.brakes[direction][fault.number] = Delay(fault.delay_ms / 1000, sock.passed[direction])
                case _:
                    sock.brakes[direction][fault.number] = Rate(fault.bytes_s, time.monotonic())
        self._retry(link)

    def _burn(self, fault: Fault, link: Link) -> None:
        """A connection has carried the bytes that the fault waited for: no byte more passes a reset or an end."""
        if fault.kind == HALF_CLOSE and fault.direction == TO_HOST:
            lost = link.pending_bytes
            link.drop_pending()
            link.connection.deliver(lost)
        self._act(fault, link)
        is_last = self._table.hit(fault.number)
        for other in list(self.met) if is_last else [link]:
            self._unbrake(other, fault.number)

    def _act(self, fault: Fault, link: Link) -> None:
        """What is done once to a connection."""
        connection = link.connection
        if not connection.is_open():
            return
        match fault.kind:
            case requests.RESET:
                link.drop_pending()
                self._deeds.reset(link)
            case requests.HALF_CLOSE if fault.direction == TO_GUEST:
                link.shut(socket.SHUT_RD)
                self._deeds.end(link, SHUTDOWN_SEND)
                self._deeds.enqueue(link)
            case requests.HALF_CLOSE:
                self._deeds.end(link, SHUTDOWN_RECEIVE)
                link.ends_after_flush = True
                self._deeds.enqueue(link)
                self._deeds.flush(link)
            case _:
                if TO_GUEST in fault.directions:
                    connection.freeze_send()
                if TO_HOST in fault.directions:
                    connection.freeze_receive()

    def _end_on(self, link: Link, number: int) -> None:
        """Takes a fault away from a connection."""
        fault = self.met[link].pop(number, None)
        if fault is None:
            return
        if fault.kind == FREEZE_CREDIT:
            frozen = {
                one for other in self.met[link].values() if other.kind == FREEZE_CREDIT for one in other.directions
            }
            connection = link.connection
            if TO_GUEST not in frozen:
                connection.thaw_send()
                self._deeds.forget(link)
            if TO_HOST not in frozen:
                connection.thaw_receive()
        if not self.met[link]:
            del self.met[link]
        self._unbrake(link, number)

    def _unbrake(self, link: Link, number: int) -> None:
        """Removes a fault's brakes; the plain socket comes back with the last of them."""
        if isinstance(link.sock, BrakedSocket):
            link.sock.remove(number)
            if not link.sock.all_brakes():
                link.sock = link.sock.release()
        self._retry(link)
