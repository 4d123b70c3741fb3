"""The connections to host programs: accepts them, reads their CONNECT line, dials those that the guest asks for.

It owns the programs' sockets from the first to the last moment, watches them in the process's one epoll, and keeps
the deadline of each wait. It moves no payload.
"""

import contextlib
import errno
import select
import socket
import time
from typing import Final

from vmkit.vsock.connection import State
from vmkit.vsock.deadlines import Deadlines
from vmkit.vsock.greeting import GREETING_MAX_BYTES, GreetingError, find_greeting, render_answer, render_full
from vmkit.vsock.interference import Interference
from vmkit.vsock.link import Link
from vmkit.vsock.muxer import MAX_CONNECTIONS, Muxer, Notice
from vmkit.vsock.requests import TO_GUEST, TO_HOST
from vmkit.vsock.traffic import Traffic

# A program sends CONNECT as soon as it connects. A silent one must not hold a place for long.
GREETING_TIMEOUT_S: Final = 10.0
# A guest's kernel answers by itself, listener or not. One that boots under an emulator can be seconds late, not this
# many.
REQUEST_TIMEOUT_S: Final = 10.0
# VSOCK_CLOSE_TIMEOUT, net/vmw_vsock/virtio_transport_common.c: what Linux grants its peer for the last RST.
CLOSE_TIMEOUT_S: Final = 8.0
# Ports kept for guests that have not sent their last RST; the oldest goes first.
MAX_CLOSING: Final = 2 * MAX_CONNECTIONS
# VSOCK_DEFAULT_CONNECT_TIMEOUT, net/vmw_vsock/af_vsock.c: after that the guest's program has given up.
DIAL_TIMEOUT_S: Final = 2.0
# How often to try a listener whose backlog is full: a UNIX socket does not report when it has room.
REDIAL_PERIOD_S: Final = 0.01
# Programs that may stand at the door at once: as many as could be let in. The kernel caps it at net.core.somaxconn.
LISTEN_BACKLOG: Final = MAX_CONNECTIONS
# Programs accepted in one turn of the loop, so that a crowd at the door does not stop the traffic.
MAX_ACCEPTS: Final = 64
# Programs that come closer together than this are a crowd.
ALONE_S: Final = 0.0002
# No descriptors or memory left on the host: accept no program for so long.
ACCEPT_PAUSE_S: Final = 0.2
# All places taken: programs that closed may hold theirs until the guest has buffers to be told with. So newcomers wait
# in the backlog, looked at so often, and are refused when this has lasted so long.
FULL_PERIOD_S: Final = 0.01
FULL_GRACE_S: Final = 1.0

_READ_MASK: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_READ_WRITE_MASK: Final = _READ_MASK | select.EPOLLOUT
_HANGUP_MASK: Final = select.EPOLLHUP | select.EPOLLERR
_END_MASK: Final = _HANGUP_MASK | select.EPOLLRDHUP
# What follows the bytes that can be read now: an end, or bytes behind an out-of-band mark. No further event will tell.
_MORE_MASK: Final = _END_MASK | select.EPOLLPRI


class HostSide:
    """All host programs of one guest.

    Invariant: a link with a socket is in `_links` under its descriptor and in the epoll set.
    """

    def __init__(
        self, epoll: select.epoll, listener: socket.socket, uds_path: str, muxer: Muxer, notice: Notice
    ) -> None:
        """`listener` is the listening UNIX socket.

        uds_path names it, and `<uds_path>_<port>` those that the guest may reach.
        """
        self._epoll = epoll
        self._listener = listener
        self._uds_path = uds_path
        self._muxer = muxer
        self._notice = notice
        # Set by attach(), before anything happens.
        self.traffic: Traffic
        self.interference: Interference
        self._links: dict[int, Link] = {}
        # Closed at the end of the turn: until then no new socket can get a descriptor that old events may still name.
        self._doomed: list[socket.socket] = []
        self._greeting = Deadlines(GREETING_TIMEOUT_S)
        self._requested = Deadlines(REQUEST_TIMEOUT_S)
        self._closing = Deadlines(CLOSE_TIMEOUT_S)
        self._dialing = Deadlines(DIAL_TIMEOUT_S)
        self._next_dial_s = 0.0
        self._accept_again_s: float | None = None
        self._full_since_s: float | None = None
        self._accept_count = 1
        self._accepted_s = 0.0
        self.is_device_running = False
        listener.setblocking(False)
        # The program that bound it may have chosen a shorter backlog. A second listen() changes only that.
        listener.listen(LISTEN_BACKLOG)
        epoll.register(listener, select.EPOLLIN)

    def attach(self, traffic: Traffic) -> None:
        """Joins the two: links with news go to `traffic`, which calls back through Hooks."""
        self.traffic = traffic
        self.interference = Interference(traffic, self._all_links, self._resume_writing)

    # Events of descriptors.

    def handle(self, fd: int, mask: int) -> bool:
        """Takes an epoll event for a descriptor of ours; False for another one, or one closed in this turn."""
        link = self._links.get(fd)
        if link is not None:
            self._handle_link(link, mask)
        elif fd == self._listener.fileno():
            self._accept()
        else:
            return False
        return True

    def _handle_link(self, link: Link, mask: int) -> None:
        if mask & _MORE_MASK:
            link.is_read_to_end = True
            link.is_hung_up |= bool(mask & _HANGUP_MASK)
        if link.is_watching_writes:
            self._resume_writing(link)
        if mask & ~select.EPOLLOUT:
            link.is_readable = True
            match link.connection.state:
                case State.GREETING:
                    self._greet(link, is_ended=bool(mask & _END_MASK))
                case State.WAITING | State.REQUESTED:
                    if link.is_hung_up:
                        self.traffic.reset(link)
                case State.OPEN:
                    self.traffic.enqueue(link)
                case State.DIALING | State.CLOSING | State.GONE:
                    pass

    def _resume_writing(self, link: Link) -> None:
        self.traffic.flush(link)
        if link.sock is not None and not link.pending_bytes:
            link.is_watching_writes = False
            self._epoll.modify(link.sock, _READ_MASK)

    # Programs that come to us.

    def _accept(self) -> None:
        now_s = time.monotonic()
        # After a pause a program mostly comes alone. A second accept() that finds none costs as much as the first.
        self._accept_count = 1 if now_s > self._accepted_s + ALONE_S else min(MAX_ACCEPTS, 2 * self._accept_count)
        self._accepted_s = now_s
        for _ in range(self._accept_count):
            if self._is_crowded():
                self._pause_accepting(FULL_PERIOD_S)
                return
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                self._notice("accept", f"cannot accept a host program: {error.strerror}")
                self._pause_accepting(ACCEPT_PAUSE_S)
                return
            self._admit(sock)

    def _is_crowded(self) -> bool:
        """Whether newcomers wait in the backlog, because all places are taken and some may soon be free."""
        if not self._muxer.is_full:
            self._full_since_s = None
            return False
        now_s = time.monotonic()
        if self._full_since_s is None:
            self._full_since_s = now_s
        return now_s < self._full_since_s + FULL_GRACE_S

    def _pause_accepting(self, pause_s: float) -> None:
        self._epoll.unregister(self._listener)
        self._accept_again_s = time.monotonic() + pause_s

    def _admit(self, sock: socket.socket) -> None:
        connection = self._muxer.admit()
        if connection is None:
            with sock, contextlib.suppress(OSError):
                # Nothing was written to this socket before, so the line fits.
                sock.send(render_full(self._muxer.max_connections), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            return
        sock.setblocking(False)
        link = self.traffic.open_link(connection)
        if not self._watch(link, sock):
            self.traffic.reset(link)
            return
        self._greeting.add(link, time.monotonic())
        self._greet(link, is_ended=False)

    def _greet(self, link: Link, *, is_ended: bool) -> None:
        """Looks for the CONNECT line, and takes it alone out of the socket: the guest gets what follows."""
        sock = link.sock
        if sock is None:
            return
        try:
            greeting = find_greeting(sock.recv(GREETING_MAX_BYTES, socket.MSG_PEEK))
            if greeting is not None:
                sock.recv(greeting.size_bytes)
        except BlockingIOError:
            greeting = None
        except OSError:
            is_ended, greeting = True, None
        except GreetingError as error:
            self._notice("refused-greeting", str(error))
            is_ended, greeting = True, None
        if greeting is not None and self.interference.refuses(0, greeting.port, TO_GUEST):
            is_ended, greeting = True, None
        if greeting is not None and not link.is_hung_up:
            self._greeting.discard(link)
            link.guest_port = greeting.port
            link.connection.await_driver()
            if self.is_device_running:
                self._request(link)
        elif is_ended:
            self.traffic.reset(link)

    def _request(self, link: Link) -> None:
        self._muxer.request(link.connection, link.guest_port)
        self._requested.add(link, time.monotonic())
        self.traffic.enqueue(link)

    def answer(self, link: Link) -> None:
        """Writes OK once the guest accepted. The line always fits: it is the first in this socket."""
        self._requested.discard(link)
        try:
            if link.sock is not None:
                link.sock.send(render_answer(link.connection.host_port), socket.MSG_NOSIGNAL)
        except OSError:
            self.traffic.reset(link)
            return
        link.is_readable = True
        self.interference.meet(link)
        self.traffic.enqueue(link)

    # Programs that the guest comes to.

    def dial(self, link: Link) -> None:
        """Connects to the listener of the port the guest asked for, or refuses."""
        connection = link.connection
        if self.interference.refuses(connection.host_port, connection.guest_port, TO_HOST):
            self._refuse_dial(link, "a fault that was asked for")
            return
        path = f"{self._uds_path}_{connection.host_port}"
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            self._refuse_dial(link, error.strerror)
            return
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            if error.errno == errno.EAGAIN:
                self._dial_later(link)
            else:
                self._refuse_dial(link, error.strerror or str(error))
            return
        self._dialing.discard(link)
        if not self._watch(link, sock):
            self.traffic.reset(link)
            return
        connection.accept()
        self.interference.meet(link)
        self.traffic.enqueue(link)

    def _dial_later(self, link: Link) -> None:
        """Tries again later, because the listener's backlog is full."""
        if link not in self._dialing:
            now_s = time.monotonic()
            self._dialing.add(link, now_s)
            self._next_dial_s = now_s + REDIAL_PERIOD_S

    def _refuse_dial(self, link: Link, reason: str | None) -> None:
        self._notice("refused-host-port", f"guest asked for host port {link.connection.host_port}: {reason}")
        self.traffic.reset(link)

    # Watching and closing.

    def _watch(self, link: Link, sock: socket.socket) -> bool:
        """Gives the link its socket. When the host has no more epoll watches, closes the socket and returns False."""
        try:
            self._epoll.register(sock, _READ_MASK)
        except OSError as error:
            self._notice("accept", f"cannot watch a host program's socket: {error.strerror}")
            sock.close()
            return False
        self._links[sock.fileno()] = link
        link.sock = sock
        return True

    def watch_writes(self, link: Link) -> None:
        """Watches for the moment when the socket takes more: bytes are pending."""
        self.interference.note_pending(link)
        if link.sock is not None and not link.is_watching_writes:
            link.is_watching_writes = True
            self._epoll.modify(link.sock, _READ_WRITE_MASK)

    def retire(self, link: Link) -> None:
        """Retires the socket of a connection that is CLOSING or GONE; with GONE, frees the connection's place, too."""
        self.traffic.forget(link)
        self.interference.part(link)
        self._greeting.discard(link)
        self._requested.discard(link)
        self._dialing.discard(link)
        if link.sock is not None:
            del self._links[link.sock.fileno()]
            self._epoll.unregister(link.sock)
            self._doomed.append(link.sock)
            link.sock = None
        link.drop_pending()
        self._muxer.dismiss(link.connection)
        if link.connection.state is State.CLOSING:
            self._wait_for_last_reset(link)
        else:
            self._closing.discard(link)
            self.traffic.close_link(link)

    def _wait_for_last_reset(self, link: Link) -> None:
        """Waits for the guest's last RST, with a deadline: a silent guest must not hold the ports for ever."""
        self._closing.add(link, time.monotonic())
        if len(self._closing) > MAX_CLOSING:
            self.traffic.reset(self._closing.first())

    def bury(self) -> None:
        """Closes the retired sockets. The turn is over, so no event of it can name them."""
        for sock in self._doomed:
            sock.close()
        self._doomed.clear()

    def stop_listening(self) -> None:
        """Accepts no further program."""
        if self._accept_again_s is None:
            self._epoll.unregister(self._listener)
        self._accept_again_s = None
        self._listener.close()

    # The driver's comings and goings.

    def _all_links(self) -> list[Link]:
        """Returns a copy in the order of arrival. The longest wait comes first, and a caller may end some links."""
        return list(self.traffic.links.values())

    def resume(self) -> None:
        """Sends the REQUESTs that waited, and goes on with all connections: the rings run."""
        self.is_device_running = True
        for link in self._all_links():
            match link.connection.state:
                case State.WAITING:
                    self._request(link)
                case State.REQUESTED:
                    self._requested.add(link, time.monotonic())
                    self.traffic.enqueue(link)
                case _:
                    self.traffic.enqueue(link)

    def suspend(self) -> None:
        """Stops the deadlines for answers of the guest: it cannot answer while the rings stand still."""
        self.is_device_running = False
        self._requested.clear()

    def forget_guest(self) -> None:
        """Ends all connections after a reset of the guest: host programs get what is pending, then their end.

        A program that only waits for an answer goes on waiting: the next driver gets its REQUEST.
        """
        for link in self._all_links():
            match link.connection.state:
                case State.REQUESTED:
                    self._requested.discard(link)
                    self._muxer.withdraw(link.connection)
                case State.DIALING | State.OPEN | State.CLOSING:
                    self.traffic.reset(link)
                case State.GONE:
                    # Its ports were used again before its last RST came: nothing is left to wait for.
                    self.traffic.flush(link)
                case State.GREETING | State.WAITING:
                    pass
        self._muxer.forget_strays()
        self.traffic.clear()

    def end_all(self) -> None:
        """Ends all links for good. Links with pending bytes stay until their programs have taken these."""
        for link in self._all_links():
            self.traffic.reset(link)

    def cut_all(self) -> int:
        """Closes the links that are left, pending or not; returns how many host programs lost bytes by it."""
        count = 0
        for link in list(self._links.values()):
            count += 1
            self.retire(link)
        self.bury()
        return count

    # Time.

    def find_next_deadline_s(self) -> float | None:
        """Returns when expire() has work next; None: there is no deadline."""
        times = []
        if self.interference.met and (due_s := self.interference.next_s()) is not None:
            times.append(due_s)
        if self._greeting:
            times.append(self._greeting.next_s())
        if self._requested:
            times.append(self._requested.next_s())
        if self._closing:
            times.append(self._closing.next_s())
        if self._dialing:
            times.append(self._next_dial_s)
        if self._accept_again_s is not None:
            times.append(self._accept_again_s)
        return min(times) if times else None

    def expire(self, now_s: float) -> None:
        """Ends the waits that took too long, and repeats the attempts that are due."""
        for link in self._greeting.take_expired(now_s):
            self._notice("refused-greeting", f"a host program sent no CONNECT line within {GREETING_TIMEOUT_S:g} s")
            self.traffic.reset(link)
        for link in self._requested.take_expired(now_s):
            self._notice(
                "no-answer", f"the guest did not answer for its port {link.guest_port} in {REQUEST_TIMEOUT_S:g} s"
            )
            self.traffic.reset(link)
        for link in self._closing.take_expired(now_s):
            self.traffic.reset(link)
        self._expire_dialing(now_s)
        self.interference.expire(now_s)
        if self._accept_again_s is not None and now_s >= self._accept_again_s:
            self._accept_again_s = None
            self._epoll.register(self._listener, select.EPOLLIN)

    def _expire_dialing(self, now_s: float) -> None:
        for link in self._dialing.take_expired(now_s):
            self._refuse_dial(link, "the listener's backlog is full")
        if now_s >= self._next_dial_s:
            self._next_dial_s = now_s + REDIAL_PERIOD_S
            for link in list(self._dialing):
                self.dial(link)
